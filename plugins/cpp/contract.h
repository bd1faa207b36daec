// The contract of plugins/contract.py: what both launchers agree on. The tests hold them equal.
#pragma once

#include <NvInferRuntime.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
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
    // A letter a dimension: T tokens, E experts, K experts a token, H hidden, I inner, R gate and up, P and Q are H and I
    // in bytes of two values, G and J in numbers beside their blocks, D T K + 2 E + 2. Of the ops that keep states: B
    // sequences, C channels, W weights a channel and V one less, N states of F by M values, A and U all keys and values
    // of a token, Y its decays.
    char const* shape;
};

// What a size of an input has to be: `factor` times the dimension `symbol` is `terms`, a sum of products of letters and
// numbers with a space between any two, like "T K + 2 E + 2". And `symbol` is a multiple of `each`.
struct Rule {
    char symbol;
    int64_t factor;
    std::string terms;
    int64_t each = 1;
};

enum class Op { kSelect, kExperts, kCausalConv, kLinearAttention };

struct Contract {
    Op op;
    char const* name;
    std::vector<Field> fields;
    std::vector<Tensor> inputs;
    std::vector<Tensor> outputs;
    // So many inputs, those from firstOptional on, are given together or not at all: biases.
    int32_t optional;
    int32_t firstOptional;
    std::vector<Rule> rules;  // besides that a letter is one size in all inputs

    // The place of a field among the fields. Throws std::runtime_error: it is none of them.
    std::size_t field(char const* field) const;
    // The contract of a node with such fields: quantized weights are other tensors, and their scales come after them.
    Contract ofNode(std::vector<Value> const& values) const;
    // Whether the metadata is handed over: the last output of LynxSelect, the last input of LynxExperts, which have the
    // field `dispatch` for it as their last.
    bool handed(std::vector<Value> const& values) const;
    // The first input that has a row for each sequence; -1: there is none.
    int32_t bySequence() const;
    bool takes(int32_t nInputs) const;
    // An input of a node that has so many.
    Tensor const& input(int32_t number, int32_t nInputs) const;
    // The first input that has a dimension, and its axis. Throws std::runtime_error: none has it.
    std::pair<int32_t, int32_t> place(char symbol, int32_t nInputs) const;
};

Contract const& selectContract();
Contract const& expertsContract();
Contract const& causalConvContract();
Contract const& linearAttentionContract();

// A type under the contract's name.
char const* typeName(nvinfer1::DataType type);

// Whether a tensor of the graph's own precision may have it.
bool isFloatType(nvinfer1::DataType type);

// A text or whole number, as it is written.
std::string shown(Field const& field, Value const& value);

// All fields' values in the contract's order, defaults filled in. Throws std::runtime_error, naming the attribute: a
// required one is missing, or one has a value that is not allowed, alone or with another's.
std::vector<Value> parseFields(Contract const& contract, nvinfer1::PluginFieldCollection const& given);

// Throws std::runtime_error, naming the input, unless its sizes fit the others'; one below 0 is not known yet.
void checkSizes(Contract const& contract, std::vector<nvinfer1::Dims> const& shapes);

// The key of plugins/specs.py, by which a node's kernels are found; `type` is the graph's own precision.
std::string keyOf(Contract const& contract, std::vector<Value> const& values, std::vector<nvinfer1::Dims> const& shapes,
    nvinfer1::DataType type);

}  // namespace lynx
