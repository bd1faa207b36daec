// The contract of plugins/contract.py: what both launchers agree on. The tests hold them equal.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

namespace lynx {

// A field's value: text for CHAR, number for the others (exact: an int32 and a float fit a double).
struct Value {
    std::string text;
    double number;
};

struct Field {
    char const* name;
    nvinfer1::PluginFieldType type;
    bool required;
    Value value;                       // the default
    std::vector<std::string> choices;  // allowed texts, or numbers as text; empty: any
};

struct Tensor {
    char const* name;
    bool isFloat;   // of the graph's own precision; otherwise of `type`
    nvinfer1::DataType type;
    char const* shape;  // a letter a dimension: T tokens, E experts, K experts a token, H hidden, I inner, R gate and up
};

struct Contract {
    char const* name;
    std::vector<Field> fields;
    std::vector<Tensor> inputs;
    std::vector<Tensor> outputs;
    int32_t optional;  // the last so many inputs are given together or not at all

    bool takes(int32_t nInputs) const {
        int32_t const every = static_cast<int32_t>(inputs.size());
        return nInputs == every || nInputs == every - optional;
    }
};

Contract const& selectContract();
Contract const& expertsContract();

// A type under the contract's name.
char const* typeName(nvinfer1::DataType type);

// Whether a tensor of the graph's own precision may have it.
bool isFloatType(nvinfer1::DataType type);

// A text or whole number, as it is written.
std::string shown(Field const& field, Value const& value);

// All fields' values in the contract's order, defaults filled in. Throws std::runtime_error, naming the attribute: a
// required one is missing, or one has a value that is not allowed.
std::vector<Value> parseFields(Contract const& contract, nvinfer1::PluginFieldCollection const& given);

}  // namespace lynx
