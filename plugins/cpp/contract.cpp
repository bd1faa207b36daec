#include "contract.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <map>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace lynx {

using namespace nvinfer1;

namespace {

Field text(char const* name, bool required, char const* value, std::vector<std::string> choices) {
    return {name, PluginFieldType::kCHAR, required, {value, 0}, std::move(choices)};
}

Field flag(char const* name, bool required, int32_t value) {
    return {name, PluginFieldType::kINT32, required, {"", double(value)}, {"0", "1"}};
}

Field whole(char const* name, bool required, int32_t value) {
    return {name, PluginFieldType::kINT32, required, {"", double(value)}, {}};
}

Field real(char const* name, bool required, float value) {
    return {name, PluginFieldType::kFLOAT32, required, {"", double(value)}, {}};
}

Tensor precise(char const* name, char const* shape) {
    return {name, true, DataType::kFLOAT, shape};
}

Tensor typed(char const* name, DataType type, char const* shape) {
    return {name, false, type, shape};
}

// The field that says in what the weights are, and the one of whether they are transposed.
constexpr char kWeights[] = "weights";
constexpr char kTransposed[] = "transposed";
constexpr char kFloat[] = "float";
constexpr std::size_t kFirstWeight = 3;

// How quantized weights are stored, as FORMATS of lynx_trt/experts.py has them.
struct Format {
    char const* name;
    int32_t perByte;   // values
    int32_t block;     // values that share a scale
    int32_t perBlock;  // numbers beside a block: its scale, and maybe its zero point
    bool precise;      // those are of the graph's own precision, otherwise of `scale`
    DataType scale;
};

constexpr std::array<Format, 7> kFormats{{
    {"mxfp4", 2, 32, 1, false, DataType::kINT8},
    {"fp8", 1, 128, 1, false, DataType::kFLOAT},
    {"nvfp4", 2, 16, 1, true, DataType::kFLOAT},
    {"int4_g32", 2, 32, 1, true, DataType::kFLOAT},
    {"int4_g32_zeros", 2, 32, 2, true, DataType::kFLOAT},
    {"int4_g128", 2, 128, 1, true, DataType::kFLOAT},
    {"int4_g128_zeros", 2, 128, 2, true, DataType::kFLOAT},
}};

std::vector<std::string> kinds() {
    std::vector<std::string> names{kFloat};
    for (Format const& format : kFormats) {
        names.emplace_back(format.name);
    }
    return names;
}

// That of a node's weights; none of LynxSelect, and of weights that are not quantized.
Format const* formatOf(Contract const& contract, std::vector<Value> const& values) {
    if (contract.op != Op::kExperts) {
        return nullptr;
    }
    std::string const& kind = values[contract.field(kWeights)].text;
    auto const found =
        std::find_if(kFormats.begin(), kFormats.end(), [&](Format const& format) { return kind == format.name; });
    return found == kFormats.end() ? nullptr : &*found;
}

// As a rule has it.
std::string times(int32_t factor, char symbol) {
    return (factor == 1 ? "" : std::to_string(factor) + " ") + symbol;
}

// The node's weights and scales in the place of the first two and the rules of their sizes; an expert has gate and up of
// `rows` times I rows.
void quantize(Contract& contract, Format const& format, int32_t rows) {
    bool const halves = format.perByte == 2;
    char const inner = halves ? 'Q' : 'I';
    contract.rules.push_back({'R', 1, times(rows * format.perByte, inner)});
    if (halves) {
        contract.rules.push_back({'P', format.perByte, "H"});
    }
    contract.rules.push_back({'G', format.block, times(format.perBlock, 'H'), format.perBlock});
    contract.rules.push_back({'J', format.block, times(format.perBlock * format.perByte, inner), format.perBlock});
    auto const first = contract.inputs.begin() + kFirstWeight;
    // An int8 says no more than how many bits there are.
    first[0] = typed("gate_up", DataType::kINT8, halves ? "ERP" : "ERH");
    first[1] = typed("down", DataType::kINT8, halves ? "EHQ" : "EHI");
    Tensor const scales[] = {
        {"gate_up_scale", format.precise, format.scale, "ERG"}, {"down_scale", format.precise, format.scale, "EHJ"}};
    contract.inputs.insert(first + 2, std::begin(scales), std::end(scales));
    contract.firstOptional += 2;
}

}  // namespace

Contract const& selectContract() {
    static auto* const contract = new Contract{Op::kSelect, "LynxSelect",
        {
            text("vote", true, "", {"count", "weight", "affinity", "score"}),
            whole("guarantee", true, 0),
            real("sensitivity", true, 0),
            flag("remap", true, 0),
            real("power", false, 1),
            real("alpha", false, 1),
            whole("beta", false, 4),
            flag("renormalize", true, 0),
            real("scale", false, 1),
            flag("dispatch", false, 0),
        },
        {
            typed("choice", DataType::kFLOAT, "TE"),
            typed("combine", DataType::kFLOAT, "TE"),
            typed("topk_index", DataType::kINT64, "TK"),
            typed("topk_weight", DataType::kFLOAT, "TK"),
            typed("budget", DataType::kINT32, ""),
            typed("floor", DataType::kFLOAT, ""),
            typed("token_mask", DataType::kBOOL, "T"),
        },
        {
            typed("index", DataType::kINT64, "TK"),
            typed("weight", DataType::kFLOAT, "TK"),
            typed("active", DataType::kINT32, ""),
        },
        0, 0, {{'D', 1, "T K + 2 E + 2"}}};
    return *contract;
}

Contract const& expertsContract() {
    static auto* const contract = new Contract{Op::kExperts, "LynxExperts",
        {
            text("activation", false, "silu", {"silu", "gelu", "gelu_tanh", "relu", "relu2"}),
            flag("gated", false, 1),
            flag(kTransposed, false, 0),
            flag("interleaved", false, 0),
            real("alpha", false, 1),
            real("limit", false, 0),
            real("up_offset", false, 0),
            text(kWeights, false, kFloat, kinds()),
            flag("dispatch", false, 0),
        },
        {
            precise("hidden", "TH"),
            typed("index", DataType::kINT64, "TK"),
            typed("weight", DataType::kFLOAT, "TK"),
            precise("gate_up", "ERH"),
            precise("down", "EHI"),
            precise("gate_up_bias", "ER"),
            precise("down_bias", "EH"),
        },
        {precise("output", "TH")}, 2, 5, {{'D', 1, "T K + 2 E + 2"}}};
    return *contract;
}

Contract const& causalConvContract() {
    static auto* const contract = new Contract{Op::kCausalConv, "LynxCausalConv",
        {text("activation", true, "", {"none", "silu"})},
        {
            precise("values", "TC"),
            precise("weight", "CW"),
            precise("past_state", "BVC"),
            typed("lengths", DataType::kINT64, "B"),
            precise("bias", "C"),
        },
        {precise("output", "TC"), precise("present_state", "BVC")}, 1, 4, {{'W', 1, "V + 1"}}};
    return *contract;
}

Contract const& linearAttentionContract() {
    static auto* const contract = new Contract{Op::kLinearAttention, "LynxLinearAttention",
        {
            whole("key_heads", true, 0),
            whole("value_heads", true, 0),
            text("update_rule", true, "", {"gated", "gated_delta"}),
            real("scale", true, 0),
            real("epsilon", true, 0),
        },
        {
            precise("query", "TA"),
            precise("key", "TA"),
            precise("value", "TU"),
            typed("decay", DataType::kFLOAT, "TY"),
            typed("beta", DataType::kFLOAT, "TN"),
            typed("past_state", DataType::kFLOAT, "BNFM"),
            typed("lengths", DataType::kINT64, "B"),
        },
        {precise("output", "TU"), typed("present_state", DataType::kFLOAT, "BNFM")}, 0, 0, {{'U', 1, "N M"}}};
    return *contract;
}

std::size_t Contract::field(char const* wanted) const {
    for (std::size_t i = 0; i < fields.size(); ++i) {
        if (std::strcmp(fields[i].name, wanted) == 0) {
            return i;
        }
    }
    throw std::runtime_error(std::string("no field is ") + wanted);
}

Contract Contract::ofNode(std::vector<Value> const& values) const {
    Contract made = *this;
    auto const number = [&](char const* name) { return static_cast<int32_t>(values[field(name)].number); };
    if (op == Op::kLinearAttention) {
        made.rules.push_back({'N', 1, std::to_string(number("value_heads"))});
        made.rules.push_back({'A', 1, std::to_string(number("key_heads")) + " F"});
    } else if (op == Op::kExperts) {
        int32_t const rows = values[field("gated")].number != 0 ? 2 : 1;
        if (Format const* const format = formatOf(*this, values)) {
            quantize(made, *format, rows);
        } else {
            made.rules.push_back({'R', 1, times(rows, 'I')});
            if (values[field(kTransposed)].number != 0) {
                made.inputs[kFirstWeight].shape = "EHR";
                made.inputs[kFirstWeight + 1].shape = "EIH";
            }
        }
    }
    if (handed(values)) {
        (op == Op::kSelect ? made.outputs : made.inputs).push_back(typed("dispatch", DataType::kINT32, "D"));
    }
    return made;
}

bool Contract::handed(std::vector<Value> const& values) const {
    return (op == Op::kSelect || op == Op::kExperts) && values.back().number != 0;
}

int32_t Contract::bySequence() const {
    auto const found =
        std::find_if(inputs.begin(), inputs.end(), [](Tensor const& tensor) { return tensor.shape[0] == 'B'; });
    return found == inputs.end() ? -1 : static_cast<int32_t>(found - inputs.begin());
}

bool Contract::takes(int32_t nInputs) const {
    int32_t const every = static_cast<int32_t>(inputs.size());
    return nInputs == every || nInputs == every - optional;
}

Tensor const& Contract::input(int32_t number, int32_t nInputs) const {
    bool const every = nInputs == static_cast<int32_t>(inputs.size());
    return inputs[!every && number >= firstOptional ? number + optional : number];
}

std::pair<int32_t, int32_t> Contract::place(char symbol, int32_t nInputs) const {
    for (int32_t i = 0; i < nInputs; ++i) {
        char const* const shape = input(i, nInputs).shape;
        char const* const found = std::strchr(shape, symbol);
        if (found != nullptr) {
            return {i, static_cast<int32_t>(found - shape)};
        }
    }
    throw std::runtime_error(std::string("no input has the dimension ") + symbol);
}

char const* typeName(DataType type) {
    switch (type) {
    case DataType::kFLOAT: return "float32";
    case DataType::kHALF: return "float16";
    case DataType::kBF16: return "bfloat16";
    case DataType::kINT32: return "int32";
    case DataType::kINT64: return "int64";
    case DataType::kBOOL: return "bool";
    case DataType::kINT8: return "int8";
    default: return "another type";
    }
}

bool isFloatType(DataType type) {
    return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

std::string shown(Field const& field, Value const& value) {
    return field.type == PluginFieldType::kCHAR ? value.text : std::to_string(static_cast<int64_t>(value.number));
}

std::vector<Value> parseFields(Contract const& contract, PluginFieldCollection const& given) {
    std::vector<Value> values;
    for (Field const& field : contract.fields) {
        PluginField const* const end = given.fields + given.nbFields;
        PluginField const* const found = std::find_if(
            given.fields, end, [&](PluginField const& each) { return std::strcmp(each.name, field.name) == 0; });
        Value value = field.value;
        if (found == end) {
            if (field.required) {
                throw std::runtime_error(std::string("it needs the attribute ") + field.name + ", and the node has none");
            }
        } else if (found->type != field.type || found->data == nullptr) {
            throw std::runtime_error(std::string("the attribute ") + field.name + " has another type than it must");
        } else if (field.type == PluginFieldType::kCHAR) {
            value.text.assign(static_cast<char const*>(found->data), static_cast<std::size_t>(found->length));
            value.text.erase(std::find(value.text.begin(), value.text.end(), '\0'), value.text.end());
        } else if (field.type == PluginFieldType::kINT32) {
            value.number = *static_cast<int32_t const*>(found->data);
        } else {
            value.number = *static_cast<float const*>(found->data);
        }
        auto const& choices = field.choices;
        if (!choices.empty() && std::find(choices.begin(), choices.end(), shown(field, value)) == choices.end()) {
            throw std::runtime_error(std::string(field.name) + " is '" + shown(field, value) + "', which is not allowed");
        }
        values.push_back(std::move(value));
    }
    if (formatOf(contract, values) != nullptr && values[contract.field(kTransposed)].number != 0) {
        throw std::runtime_error("transposed is 1, and weights in " + values[contract.field(kWeights)].text +
            " have to lie along what is summed over");
    }
    return values;
}

void checkSizes(Contract const& contract, std::vector<Dims> const& shapes) {
    auto const nInputs = static_cast<int32_t>(shapes.size());
    std::map<char, std::pair<char const*, int64_t>> known;
    for (int32_t i = 0; i < nInputs; ++i) {
        Tensor const& tensor = contract.input(i, nInputs);
        for (int32_t axis = 0; axis < shapes[i].nbDims; ++axis) {
            char const symbol = tensor.shape[axis];
            int64_t const size = shapes[i].d[axis];
            if (size < 0) {
                continue;
            }
            auto const [name, first] = known.emplace(symbol, std::make_pair(tensor.name, size)).first->second;
            if (size != first) {
                throw std::runtime_error(std::string(tensor.name) + " has " + symbol + " = " + std::to_string(size) +
                    ", and " + name + " has " + std::to_string(first));
            }
        }
    }
    for (Rule const& rule : contract.rules) {
        auto const left = known.find(rule.symbol);
        bool all = left != known.end();
        int64_t right = 0, product = 1;
        std::istringstream words(rule.terms);
        for (std::string word; words >> word;) {
            if (word == "+") {
                right += std::exchange(product, 1);
            } else if (std::isdigit(static_cast<unsigned char>(word[0])) != 0) {
                product *= std::stoll(word);
            } else {
                auto const found = known.find(word[0]);
                all = all && found != known.end();
                product *= found != known.end() ? found->second.second : 0;
            }
        }
        right += product;
        if (all && rule.factor * left->second.second != right) {
            auto const [name, size] = left->second;
            throw std::runtime_error(std::string(name) + " has " + rule.symbol + " = " + std::to_string(size) + ", and " +
                (rule.factor != 1 ? std::to_string(rule.factor) + " " : "") + rule.symbol + " has to be " + rule.terms +
                ", which is " + std::to_string(right));
        }
        if (all && left->second.second % rule.each != 0) {
            auto const [name, size] = left->second;
            throw std::runtime_error(std::string(name) + " has " + rule.symbol + " = " + std::to_string(size) +
                ", which has to be a multiple of " + std::to_string(rule.each));
        }
    }
}

// Floats are the bits of the float32 in hexadecimal.
std::string keyOf(
    Contract const& contract, std::vector<Value> const& values, std::vector<Dims> const& shapes, DataType type) {
    std::string result;
    auto const add = [&](char const* name, std::string const& value) { result += ";" + (name + ("=" + value)); };
    auto const size = [&](char const* name, int64_t value) { add(name, std::to_string(value)); };
    int64_t const handed = contract.handed(values) ? 1 : 0;
    auto const inputs = static_cast<int64_t>(shapes.size());
    std::size_t fields = values.size();
    if (contract.op == Op::kCausalConv) {
        result = "causal_conv";
        size("channels", shapes[1].d[0]);
        size("width", shapes[1].d[1]);
        add("dtype", typeName(type));
        size("bias", inputs > contract.firstOptional ? 1 : 0);
    } else if (contract.op == Op::kLinearAttention) {
        result = "linear_attention";
        size("keys", shapes[5].d[2]);
        size("values", shapes[5].d[3]);
        add("dtype", typeName(type));
        size("decays", shapes[3].d[1]);
    } else if (contract.op == Op::kSelect) {
        --fields;  // the last is `dispatch`
        result = "select";
        size("experts", shapes[0].d[1]);
        size("experts_per_token", shapes[2].d[1]);
    } else {
        bool const transposed = values[contract.field(kTransposed)].number != 0;
        Format const* const format = formatOf(contract, values);
        int64_t const packed = format != nullptr ? format->perByte : 1;
        --fields;
        result = "experts";
        size("experts", shapes[4].d[0]);
        size("experts_per_token", shapes[1].d[1]);
        size("hidden", shapes[0].d[1]);
        size("inner", shapes[4].d[transposed ? 1 : 2] * packed);
        add("dtype", typeName(type));
        size("bias", inputs - handed > contract.firstOptional ? 1 : 0);
        size("dispatch_given", handed);
    }
    for (std::size_t i = 0; i < fields; ++i) {
        Field const& field = contract.fields[i];
        if (field.type == PluginFieldType::kFLOAT32) {
            auto const number = static_cast<float>(values[i].number);
            uint32_t bits = 0;
            std::memcpy(&bits, &number, sizeof bits);
            std::array<char, 9> digits{};
            std::snprintf(digits.data(), digits.size(), "%08x", static_cast<unsigned>(bits));
            add(field.name, digits.data());
        } else {
            add(field.name, shown(field, values[i]));
        }
    }
    return contract.op == Op::kSelect ? result + ";dispatch_taken=" + std::to_string(handed) : result;
}

}  // namespace lynx
