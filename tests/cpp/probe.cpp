// Does with the plugin library what TensorRT would, and prints what it answers. Commands come on standard input:
//   op NAME | field NAME char|int32|float32 VALUE | kernels ID FILE | noblob ID | create
//   input TYPE SIZE...  (a size may be T, B, or D for 2 T + 18) | outputs | formats | workspace T B | run T B | time T B
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <deque>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

std::vector<std::pair<std::string, DataType>> const kTypes{{"float32", DataType::kFLOAT},
    {"float16", DataType::kHALF}, {"bfloat16", DataType::kBF16}, {"int32", DataType::kINT32},
    {"int64", DataType::kINT64}, {"bool", DataType::kBOOL}, {"int8", DataType::kINT8}};

DataType typeOf(std::string const& name) {
    for (auto const& [known, type] : kTypes) {
        if (known == name) return type;
    }
    std::cerr << "unknown type " << name << "\n";
    std::exit(2);
}

std::string nameOf(DataType type) {
    for (auto const& [name, known] : kTypes) {
        if (known == type) return name;
    }
    return "?";
}

// TensorRT hands out objects of a class that nobody else can make: a table of virtual functions, then its pointer.
template <typename Implementation>
struct Handle {
    void* table{};
    Implementation* implementation{};
};

// An expression of dimensions is text, a sum of products as a+b*c, and a size if it is the same in all steps.
struct Expression final : apiv::VDimensionExpr {
    std::string text;
    bool constant{};
    int64_t size{};
    Handle<apiv::VDimensionExpr> handle;

    Expression(std::string text, bool constant, int64_t size) : text(std::move(text)), constant(constant), size(size) {
        handle.implementation = this;
    }
    bool isConstant() const override { return constant; }
    int64_t getConstantValue() const override { return constant ? size : std::numeric_limits<int64_t>::min(); }
    bool isSizeTensor() const override { return false; }
};
static_assert(sizeof(Handle<apiv::VDimensionExpr>) == sizeof(IDimensionExpr));

struct Expressions final : apiv::VExprBuilder {
    std::deque<Expression> made;

    IDimensionExpr const* keep(std::string const& text, bool constant = false, int64_t size = 0) {
        made.emplace_back(text, constant, size);
        return reinterpret_cast<IDimensionExpr const*>(&made.back().handle);
    }
    static std::string const& text(IDimensionExpr const& each) {
        auto const& handle = reinterpret_cast<Handle<apiv::VDimensionExpr> const&>(each);
        return static_cast<Expression const*>(handle.implementation)->text;
    }

    IDimensionExpr const* constant(int64_t value) override { return keep(std::to_string(value)); }
    IDimensionExpr const* operation(
        DimensionOperation op, IDimensionExpr const& first, IDimensionExpr const& second) override {
        if (op != DimensionOperation::kSUM && op != DimensionOperation::kPROD) return nullptr;
        return keep(text(first) + (op == DimensionOperation::kSUM ? "+" : "*") + text(second));
    }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
        return nullptr;
    }
};

static_assert(sizeof(Handle<apiv::VExprBuilder>) == sizeof(IExprBuilder));

struct Input {
    DataType type;
    std::vector<std::string> sizes;
};

struct Probe {
    IPluginCreatorV3One* creator{};
    std::deque<std::string> bytes;  // keeps fields' names and values where they are
    std::vector<PluginField> fields;
    std::vector<Input> inputs;
    IPluginV3* plugin{};
    IPluginV3* timed{};  // what a builder may run, with inputs that it makes up

    char const* keep(std::string const& text) {
        bytes.push_back(text);
        return bytes.back().data();
    }

    void field(std::string const& name, std::string const& type, std::string const& value) {
        char const* const kept = keep(name);
        if (type == "char") {  // with its end, as the ONNX parser passes it
            fields.emplace_back(kept, keep(value), PluginFieldType::kCHAR, int32_t(value.size() + 1));
            return;
        }
        std::string raw(4, '\0');
        int32_t const whole = type == "int32" ? std::stoi(value) : 0;
        float const real = type == "int32" ? 0 : std::stof(value);
        std::memcpy(raw.data(), type == "int32" ? static_cast<void const*>(&whole) : &real, 4);
        auto const kind = type == "int32" ? PluginFieldType::kINT32 : PluginFieldType::kFLOAT32;
        fields.emplace_back(kept, keep(raw), kind, 1);
    }

    template <typename Interface>
    Interface* as(PluginCapabilityType type) {
        return static_cast<Interface*>(plugin->getCapabilityInterface(type));
    }

    std::vector<PluginTensorDesc> descriptions(int64_t tokens, int64_t sequences) {
        std::vector<PluginTensorDesc> result;
        for (Input const& input : inputs) {
            PluginTensorDesc desc{};
            desc.type = input.type;
            desc.format = TensorFormat::kLINEAR;
            desc.dims.nbDims = int32_t(input.sizes.size());
            for (std::size_t i = 0; i < input.sizes.size(); ++i) {
                std::string const& size = input.sizes[i];
                desc.dims.d[i] = size == "T" ? tokens
                    : size == "B"            ? sequences
                    : size == "D"            ? 2 * tokens + 18
                                             : std::stoll(size);
            }
            result.push_back(desc);
        }
        return result;
    }

    void create() {
        PluginFieldCollection const given{int32_t(fields.size()), fields.data()};
        plugin = creator->createPlugin("node", &given, TensorRTPhase::kBUILD);
        if (plugin == nullptr) {
            std::cout << "refused\n";
            return;
        }
        timed = plugin->clone();
        // As an engine does: made again from what was stored, then cloned for a context.
        auto const* const stored = as<IPluginV3OneRuntime>(PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
        plugin = creator->createPlugin("node", stored, TensorRTPhase::kRUNTIME);
        plugin = as<IPluginV3OneRuntime>(PluginCapabilityType::kRUNTIME)->attachToContext(nullptr);
        auto* const core = as<IPluginV3OneCore>(PluginCapabilityType::kCORE);
        std::cout << "plugin " << core->getPluginName() << " " << core->getPluginVersion() << " "
                  << core->getPluginNamespace() << "\n";
        auto const* const again = as<IPluginV3OneRuntime>(PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
        for (int32_t i = 0; i < again->nbFields; ++i) {
            PluginField const& each = again->fields[i];
            int const size = each.type == PluginFieldType::kCHAR || each.type == PluginFieldType::kINT8 ? 1 : 4;
            std::printf("stored %s %d ", each.name, int(each.type));
            for (int32_t n = 0; n < each.length * size; ++n) {
                std::printf("%02x", static_cast<unsigned char const*>(each.data)[n]);
            }
            std::printf("\n");
        }
        std::fflush(stdout);
    }

    void outputs() {
        auto* const build = as<IPluginV3OneBuild>(PluginCapabilityType::kBUILD);
        int32_t const count = build->getNbOutputs();
        std::vector<DataType> types(count), given;
        std::vector<DimsExprs> shapes(inputs.size()), results(count);
        Expressions expressions;
        for (std::size_t i = 0; i < inputs.size(); ++i) {
            given.push_back(inputs[i].type);
            shapes[i].nbDims = int32_t(inputs[i].sizes.size());
            for (int32_t axis = 0; axis < shapes[i].nbDims; ++axis) {
                std::string const& size = inputs[i].sizes[axis];
                bool const constant = size != "T" && size != "B" && size != "D";
                shapes[i].d[axis] = expressions.keep(std::to_string(i) + "." + std::to_string(axis), constant,
                    constant ? std::stoll(size) : 0);
            }
        }
        Handle<apiv::VExprBuilder> builder{nullptr, &expressions};
        int const types_status = build->getOutputDataTypes(types.data(), count, given.data(), int32_t(given.size()));
        int const shapes_status = build->getOutputShapes(shapes.data(), int32_t(shapes.size()), nullptr, 0,
            results.data(), count, reinterpret_cast<IExprBuilder&>(builder));
        if (types_status != 0 || shapes_status != 0) {
            std::cout << "refused\n";
            return;
        }
        for (int32_t i = 0; i < count; ++i) {
            std::cout << "output " << nameOf(types[i]);
            for (int32_t axis = 0; axis < results[i].nbDims; ++axis) {
                std::cout << " " << Expressions::text(*results[i].d[axis]);
            }
            std::cout << "\n";
        }
    }

    // Every type and format at each position, the others being right.
    void formats() {
        auto* const build = as<IPluginV3OneBuild>(PluginCapabilityType::kBUILD);
        int32_t const count = build->getNbOutputs();
        std::vector<DataType> types(count), given;
        for (Input const& input : inputs) given.push_back(input.type);
        build->getOutputDataTypes(types.data(), count, given.data(), int32_t(given.size()));
        given.insert(given.end(), types.begin(), types.end());
        for (std::size_t position = 0; position < given.size(); ++position) {
            std::cout << "formats " << position << " ";
            for (TensorFormat format : {TensorFormat::kLINEAR, TensorFormat::kCHW32}) {
                for (auto const& [name, type] : kTypes) {
                    std::vector<DynamicPluginTensorDesc> tensors(given.size());
                    for (std::size_t i = 0; i < given.size(); ++i) {
                        tensors[i].desc.type = i == position ? type : given[i];
                        tensors[i].desc.format = i == position ? format : TensorFormat::kLINEAR;
                    }
                    std::cout << build->supportsFormatCombination(
                        int32_t(position), tensors.data(), int32_t(inputs.size()), count);
                }
            }
            std::cout << "\n";
        }
    }

    void workspace(int64_t tokens, int64_t sequences) {
        std::vector<DynamicPluginTensorDesc> tensors;
        for (PluginTensorDesc const& desc : descriptions(tokens, sequences)) {
            tensors.push_back({desc, desc.dims, desc.dims, desc.dims});
        }
        auto* const build = as<IPluginV3OneBuild>(PluginCapabilityType::kBUILD);
        std::cout << "workspace " << build->getWorkspaceSize(tensors.data(), int32_t(tensors.size()), nullptr, 0)
                  << "\n";
    }

    void run(int64_t tokens, int64_t sequences) {
        auto* const runtime = as<IPluginV3OneRuntime>(PluginCapabilityType::kRUNTIME);
        auto const desc = descriptions(tokens, sequences);
        std::vector<void const*> from;
        std::vector<void*> to;
        for (std::size_t i = 0; i < inputs.size(); ++i) from.push_back(reinterpret_cast<void*>(0x1000 * (i + 1)));
        for (std::size_t i = 0; i < 4; ++i) to.push_back(reinterpret_cast<void*>(0x100000 * (i + 1)));
        int const changed = runtime->onShapeChange(desc.data(), int32_t(desc.size()), nullptr, 0);
        int const status = runtime->enqueue(desc.data(), nullptr, from.data(), to.data(),
            reinterpret_cast<void*>(0x7000000), reinterpret_cast<cudaStream_t>(77));
        std::cout << "status " << changed << " " << status << std::endl;
    }

    void perform(std::istringstream& line, IPluginCreatorInterface* const* creators, int32_t count) {
        std::string command, a, b;
        line >> command;
        if (command == "op") {
            line >> a;
            for (int32_t i = 0; i < count; ++i) {
                auto* const each = static_cast<IPluginCreatorV3One*>(creators[i]);
                if (a == each->getPluginName()) creator = each;
            }
            auto const* const names = creator->getFieldNames();
            for (int32_t i = 0; i < names->nbFields; ++i) {
                std::cout << "field " << names->fields[i].name << " " << int(names->fields[i].type) << "\n";
            }
        } else if (command == "field") {
            line >> a >> b;
            std::string value;
            line >> value;
            field(a, b, value);
        } else if (command == "kernels" || command == "noblob") {
            line >> a >> b;
            field("kernels_id", "char", a);
            if (command == "kernels") {
                std::ifstream file(b, std::ios::binary);
                std::string const blob{std::istreambuf_iterator<char>(file), {}};
                fields.emplace_back("kernels", keep(blob), PluginFieldType::kINT8, int32_t(blob.size()));
            }
        } else if (command == "create") {
            create();
        } else if (command == "input") {
            line >> a;
            Input input{typeOf(a), {}};
            while (line >> b) input.sizes.push_back(b);
            inputs.push_back(input);
        } else if (command == "outputs") {
            outputs();
        } else if (command == "formats") {
            formats();
        } else if (command == "workspace" || command == "run" || command == "time") {
            int64_t tokens = 0, sequences = 1;
            line >> tokens;
            if (!(line >> sequences)) sequences = 1;
            if (command == "time") std::swap(plugin, timed);
            command == "workspace" ? workspace(tokens, sequences) : run(tokens, sequences);
            if (command == "time") std::swap(plugin, timed);
        }
    }
};

}  // namespace

int main(int, char** arguments) {
    void* const library = dlopen(arguments[1], RTLD_NOW);
    if (library == nullptr) {
        std::cerr << dlerror() << "\n";
        return 2;
    }
    using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
    int32_t count = 0;
    auto const creators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"))(count);
    Probe probe;
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        probe.perform(words, creators, count);
        std::fflush(stdout);
        std::cout.flush();
    }
    return 0;
}
