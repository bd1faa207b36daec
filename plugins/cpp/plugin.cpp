// The ops of plugins/contract.py as IPluginV3: what they answer comes from contract.h, and what they launch from the plans
// in kernels.h, as plugins/launcher.py does it.
//
// Nothing here may throw into TensorRT: what crosses the boundary is noexcept, and runs inside `guarded`.

#include <NvInferRuntime.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "contract.h"
#include "driver.h"
#include "kernels.h"

#define LYNX_EXPORT extern "C" __attribute__((visibility("default")))

namespace lynx {
namespace {

using namespace nvinfer1;

constexpr char kVersion[] = "1";
constexpr char kNamespace[] = "lynx";
constexpr char kKernelsId[] = "kernels_id";
constexpr char kKernels[] = "kernels";
// Pointers are multiples of these, as in plugins/launcher.py.
constexpr uint64_t kTensorAlignment = 16, kValueAlignment = 4, kWorkspaceAlignment = 64;

// ---- messages

ILoggerFinder* gLoggerFinder = nullptr;

void report(std::string const& message) {
    ILogger* const logger = gLoggerFinder != nullptr ? gLoggerFinder->findLogger() : nullptr;
    if (logger != nullptr) {
        logger->log(ILogger::Severity::kERROR, message.c_str());
    } else {
        std::fprintf(stderr, "%s\n", message.c_str());
    }
}

// The result of a function, or `failure` after reporting why, with the op's and the node's names.
template <typename Result, typename Function>
Result guarded(char const* op, char const* node, Result failure, Function const& function) noexcept {
    try {
        return function();
    } catch (std::exception const& error) {
        try {
            report(std::string(op) + " " + node + ": " + error.what());
        } catch (...) {
            std::fputs("lynx plugin: out of memory\n", stderr);
        }
    } catch (...) {
        std::fputs("lynx plugin: unknown error\n", stderr);
    }
    return failure;
}

// ---- the plugin

class Plugin final : public IPluginV3,
                     public IPluginV3OneCore,
                     public IPluginV3OneBuild,
                     public IPluginV3OneRuntime {
public:
    // The contract is that of the node (Contract::ofNode). A builder may time a plugin on inputs that it makes up: indices
    // of experts that there are not. Until it is attached to an execution context, one for a build launches nothing.
    Plugin(Contract contract, std::vector<Value> values, std::string node, std::string kernelsId,
        std::shared_ptr<std::string const> blob, bool building)
        : contract_(std::move(contract))
        , values_(std::move(values))
        , node_(std::move(node))
        , kernelsId_(std::move(kernelsId))
        , blob_(std::move(blob))
        , building_(building) {
        storeFields();
    }

    // ---- core

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
        case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    IPluginV3* clone() noexcept override { return copy(building_); }

    char const* getPluginName() const noexcept override { return contract_.name; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

    // ---- build

    int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(contract_.outputs.size()); }

    int32_t configurePlugin(
        DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) noexcept override {
        return 0;
    }

    int32_t getOutputDataTypes(
        DataType* outputTypes, int32_t nOutputs, DataType const* inputTypes, int32_t nInputs) const noexcept override {
        return guarded(contract_.name, node_.c_str(), -1, [&] {
            DataType const precision = checkTypes(inputTypes, nInputs);
            for (int32_t i = 0; i < nOutputs; ++i) {
                Tensor const& output = contract_.outputs[i];
                outputTypes[i] = output.isFloat ? precision : output.type;
            }
            return 0;
        });
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t nInputs, DimsExprs const*, int32_t, DimsExprs* outputs,
        int32_t nOutputs, IExprBuilder& builder) noexcept override {
        return guarded(contract_.name, node_.c_str(), -1, [&] {
            checkRanks(inputs, nInputs);
            checkSizes(contract_, knownSizes(inputs, nInputs));
            for (int32_t i = 0; i < nOutputs; ++i) {
                std::string const shape = contract_.outputs[i].shape;
                outputs[i].nbDims = static_cast<int32_t>(shape.size());
                for (std::size_t axis = 0; axis < shape.size(); ++axis) {
                    outputs[i].d[axis] = dimension(shape[axis], inputs, nInputs, builder);
                }
            }
            return 0;
        });
    }

    bool supportsFormatCombination(
        int32_t position, DynamicPluginTensorDesc const* tensors, int32_t nInputs, int32_t) noexcept override {
        if (!contract_.takes(nInputs) || tensors[position].desc.format != TensorFormat::kLINEAR) {
            return false;
        }
        auto const tensor = [&](int32_t each) -> Tensor const& {
            return each < nInputs ? contract_.input(each, nInputs) : contract_.outputs[each - nInputs];
        };
        DataType const type = tensors[position].desc.type;
        if (!tensor(position).isFloat) {
            return type == tensor(position).type;
        }
        int32_t first = 0;
        while (!tensor(first).isFloat) {
            ++first;
        }
        return isFloatType(type) && type == tensors[first].desc.type;
    }

    std::size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t nInputs, DynamicPluginTensorDesc const*,
        int32_t) const noexcept override {
        return guarded<std::size_t>(contract_.name, node_.c_str(), 0, [&]() -> std::size_t {
            if (kernelsId_.empty()) {
                return 0;
            }
            std::vector<Dims> shapes;
            for (int32_t i = 0; i < nInputs; ++i) {
                shapes.push_back(inputs[i].max);
            }
            return published(kernelsId_).workspaceBytes(
                keyOf(contract_, values_, shapes, inputs[0].desc.type), shapes[0].d[0]);
        });
    }

    // ---- run

    int32_t onShapeChange(
        PluginTensorDesc const* inputs, int32_t nInputs, PluginTensorDesc const*, int32_t) noexcept override {
        return guarded(contract_.name, node_.c_str(), -1, [&] {
            if (!kernelsId_.empty() && !building_) {  // TensorRT also calls this where nothing runs; enqueue refuses
                nInputs_ = nInputs;
                prepare(inputs);
            }
            return 0;
        });
    }

    int32_t enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*, void const* const* inputs,
        void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        if (building_) {
            return 0;
        }
        return guarded(contract_.name, node_.c_str(), -1, [&] {
            if (kernelsId_.empty()) {
                throw std::runtime_error("it holds no GPU kernels, so this engine can't run: build it again with --sm "
                                         "and the number of your GPU");
            }
            if (counts(inputDesc) != counts_) {
                prepare(inputDesc);
            }
            for (Pointer const& pointer : pointers_) {
                launches_[pointer.launch].words[pointer.word] = address(pointer, inputs, outputs, workspace);
            }
            for (Launch& each : launches_) {
                launch(each, stream);
            }
            return 0;
        });
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return copy(false); }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &collection_; }

private:
    IPluginV3* copy(bool building) noexcept {
        return guarded<IPluginV3*>(contract_.name, node_.c_str(), nullptr,
            [&] { return new Plugin(contract_, values_, node_, kernelsId_, blob_, building); });
    }

    enum class Source { kInput, kOutput, kWorkspace };

    // A word to fill in before a launch: of an input or output by number, or workspace plus offset.
    struct Pointer {
        std::size_t launch;
        std::size_t word;
        Source source;
        int64_t number;
        uint64_t alignment;
    };

    // TensorRT reads the fields after getFieldsToSerialize has returned, so their values live with the plugin.
    void storeFields() {
        numbers_.resize(values_.size());
        for (std::size_t i = 0; i < values_.size(); ++i) {
            Field const& field = contract_.fields[i];
            void const* data = numbers_[i].data();
            int32_t length = 1;
            if (field.type == PluginFieldType::kCHAR) {
                data = values_[i].text.data();
                length = static_cast<int32_t>(values_[i].text.size());
            } else if (field.type == PluginFieldType::kINT32) {
                auto const number = static_cast<int32_t>(values_[i].number);
                std::memcpy(numbers_[i].data(), &number, sizeof number);
            } else {
                auto const number = static_cast<float>(values_[i].number);
                std::memcpy(numbers_[i].data(), &number, sizeof number);
            }
            fields_.emplace_back(field.name, data, field.type, length);
        }
        if (!kernelsId_.empty()) {
            fields_.emplace_back(
                kKernelsId, kernelsId_.data(), PluginFieldType::kCHAR, static_cast<int32_t>(kernelsId_.size()));
        }
        if (blob_ != nullptr) {
            fields_.emplace_back(kKernels, blob_->data(), PluginFieldType::kINT8, static_cast<int32_t>(blob_->size()));
        }
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    }

    void checkCount(int32_t nInputs) const {
        if (contract_.takes(nInputs)) {
            return;
        }
        auto const every = static_cast<int32_t>(contract_.inputs.size());
        std::string const fewer = contract_.optional > 0 ? std::to_string(every - contract_.optional) + " or " : "";
        bool const given = contract_.op == Op::kExperts && contract_.handed(values_);
        throw std::runtime_error("it has " + std::to_string(nInputs) + " inputs; it takes " + fewer +
            std::to_string(every) + (given ? " with dispatch = 1" : ""));
    }

    // Throws, naming the input, unless such inputs are the op's; returns the graph's precision.
    DataType checkTypes(DataType const* types, int32_t nInputs) const {
        checkCount(nInputs);
        DataType precision = DataType::kFLOAT;
        bool known = false;
        for (int32_t i = 0; i < nInputs; ++i) {
            Tensor const& tensor = contract_.input(i, nInputs);
            bool const right = tensor.isFloat ? (known ? types[i] == precision : isFloatType(types[i]))
                                              : types[i] == tensor.type;
            if (!right) {
                char const* const wanted = !tensor.isFloat ? typeName(tensor.type)
                    : known                                ? typeName(precision)
                                                           : "float32, float16, bfloat16";
                throw std::runtime_error(std::string(tensor.name) + " is " + typeName(types[i]) + "; allowed: " + wanted);
            }
            if (tensor.isFloat) {
                precision = types[i];
                known = true;
            }
        }
        return precision;
    }

    void checkRanks(DimsExprs const* inputs, int32_t nInputs) const {
        checkCount(nInputs);
        for (int32_t i = 0; i < nInputs; ++i) {
            Tensor const& tensor = contract_.input(i, nInputs);
            if (inputs[i].nbDims != static_cast<int32_t>(std::strlen(tensor.shape))) {
                throw std::runtime_error(std::string(tensor.name) + " has " + std::to_string(inputs[i].nbDims) +
                    " dimensions; it must have " + std::to_string(std::strlen(tensor.shape)));
            }
        }
    }

    // The inputs' sizes that are the same in all steps, -1 for others.
    static std::vector<Dims> knownSizes(DimsExprs const* inputs, int32_t nInputs) {
        std::vector<Dims> shapes(static_cast<std::size_t>(nInputs));
        for (int32_t i = 0; i < nInputs; ++i) {
            shapes[i].nbDims = inputs[i].nbDims;
            for (int32_t axis = 0; axis < inputs[i].nbDims; ++axis) {
                IDimensionExpr const& size = *inputs[i].d[axis];
                shapes[i].d[axis] = size.isConstant() ? size.getConstantValue() : -1;
            }
        }
        return shapes;
    }

    // A dimension of an output: one of an input, or that of the metadata.
    IDimensionExpr const* dimension(
        char symbol, DimsExprs const* inputs, int32_t nInputs, IExprBuilder& builder) const {
        if (symbol != 'D') {
            auto const [input, axis] = contract_.place(symbol, nInputs);
            return inputs[input].d[axis];
        }
        auto const joined = [&](DimensionOperation operation, IDimensionExpr const* a, IDimensionExpr const* b) {
            IDimensionExpr const* const result = a && b ? builder.operation(operation, *a, *b) : nullptr;
            if (result == nullptr) {
                throw std::runtime_error("TensorRT can't express the size of the metadata");
            }
            return result;
        };
        auto const each = [&](char name) { return dimension(name, inputs, nInputs, builder); };
        auto const pairs = joined(DimensionOperation::kPROD, each('T'), each('K'));
        auto const experts = joined(DimensionOperation::kPROD, builder.constant(2), each('E'));
        return joined(DimensionOperation::kSUM, joined(DimensionOperation::kSUM, pairs, experts), builder.constant(2));
    }

    // T and B of a step; B is 0 for an op that knows of no sequences.
    std::pair<int64_t, int64_t> counts(PluginTensorDesc const* inputs) const {
        int32_t const sequences = contract_.bySequence();
        return {inputs[0].dims.d[0], sequences < 0 ? 0 : inputs[sequences].dims.d[0]};
    }

    // Resolves the plan for the shapes' T and B: functions, grids, and where each argument comes from.
    void prepare(PluginTensorDesc const* inputs) {
        std::vector<Dims> shapes;
        for (int32_t i = 0; i < nInputs_; ++i) {
            shapes.push_back(inputs[i].dims);
        }
        counts_ = {-1, -1};  // if this fails, nothing is prepared
        checkSizes(contract_, shapes);
        launches_.clear();
        pointers_.clear();
        auto const found = counts(inputs);
        auto const [tokens, sequences] = found;
        if (sequences > 0 && tokens % sequences != 0) {
            throw std::runtime_error(
                "T = " + std::to_string(tokens) + " is no multiple of B = " + std::to_string(sequences));
        }
        Device const device = currentDevice();
        Kernels const& kernels = published(kernelsId_);
        std::string const key = keyOf(contract_, values_, shapes, inputs[0].type);
        Plan const& plan = kernels.plan(key, device.sm, tokens, sequences);
        auto const offsets = plan.offsets(tokens);
        for (Step const& step : plan.steps) {
            int64_t const programs = step.grid.programs(tokens, device.multiprocessors, sequences);
            if (programs > 0) {
                add(step, kernels.cubin(step.cubin), static_cast<unsigned>(programs), offsets, found, device);
            }
        }
        counts_ = found;
    }

    void add(Step const& step, Cubin const& cubin, unsigned programs, std::map<std::string, int64_t> const& offsets,
        std::pair<int64_t, int64_t> const& counts, Device const& device) {
        // Every kernel has two more pointers: its scratch memory, and one that is always null.
        std::vector<std::string> names = step.arguments;
        names.emplace_back(cubin.scratch > 0 ? "scratch" : "null");
        names.emplace_back("null");
        Launch made{loadFunction(cubin, device), programs, static_cast<unsigned>(cubin.threads),
            static_cast<unsigned>(cubin.shared), step.programmatic, step.cluster, std::vector<uint64_t>(names.size()),
            {}};
        for (std::size_t i = 0; i < names.size(); ++i) {
            made.addresses.push_back(&made.words[i]);  // stays right when `made` moves: the words lie on the heap
            if (names[i] == "T" || names[i] == "B") {
                made.words[i] = static_cast<uint64_t>(names[i] == "T" ? counts.first : counts.second);
            } else if (names[i] != "null") {
                auto const region = offsets.find(names[i]);
                pointers_.push_back(region != offsets.end()
                        ? Pointer{launches_.size(), i, Source::kWorkspace, region->second, kWorkspaceAlignment}
                        : bound(names[i], i));
            }
        }
        launches_.push_back(std::move(made));
    }

    Pointer bound(std::string const& name, std::size_t word) const {
        auto const alignment = [](Tensor const& tensor) {
            return tensor.shape[0] == '\0' ? kValueAlignment : kTensorAlignment;
        };
        for (std::size_t i = 0; i < contract_.outputs.size(); ++i) {
            Tensor const& output = contract_.outputs[i];
            if (name == output.name) {
                return {launches_.size(), word, Source::kOutput, static_cast<int64_t>(i), alignment(output)};
            }
        }
        for (int32_t i = 0; i < nInputs_; ++i) {
            Tensor const& input = contract_.input(i, nInputs_);
            if (name == input.name) {
                return {launches_.size(), word, Source::kInput, i, alignment(input)};
            }
        }
        throw std::runtime_error("a kernel wants " + name + ", which the node lacks: build the engine again");
    }

    static uint64_t address(Pointer const& pointer, void const* const* inputs, void* const* outputs, void* workspace) {
        uint64_t value = 0;
        switch (pointer.source) {
        case Source::kInput: value = reinterpret_cast<uint64_t>(inputs[pointer.number]); break;
        case Source::kOutput: value = reinterpret_cast<uint64_t>(outputs[pointer.number]); break;
        case Source::kWorkspace: value = reinterpret_cast<uint64_t>(workspace) + pointer.number; break;
        }
        if (value % pointer.alignment != 0) {
            throw std::runtime_error("a tensor does not lie at a multiple of " + std::to_string(pointer.alignment) +
                ": bind buffers as CUDA allocates them");
        }
        return value;
    }

    Contract contract_;
    std::vector<Value> values_;
    std::string node_;
    std::string kernelsId_;
    std::shared_ptr<std::string const> blob_;  // null, except on the node that carries the kernels
    bool building_;

    std::vector<std::array<char, 4>> numbers_;
    std::vector<PluginField> fields_;
    PluginFieldCollection collection_{};

    int32_t nInputs_ = 0;
    std::pair<int64_t, int64_t> counts_{-1, -1};
    std::vector<Launch> launches_;
    std::vector<Pointer> pointers_;
};

// ---- the creators

class Creator final : public IPluginCreatorV3One {
public:
    explicit Creator(Contract const& contract) : contract_(contract) {
        for (Field const& field : contract.fields) {
            fields_.emplace_back(field.name, nullptr, field.type, 0);
        }
        fields_.emplace_back(kKernelsId, nullptr, PluginFieldType::kCHAR, 0);
        fields_.emplace_back(kKernels, nullptr, PluginFieldType::kINT8, 0);
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    }

    IPluginV3* createPlugin(
        char const* name, PluginFieldCollection const* fields, TensorRTPhase phase) noexcept override {
        return guarded<IPluginV3*>(contract_.name, name, nullptr, [&]() -> IPluginV3* {
            std::string kernelsId;
            std::shared_ptr<std::string const> blob;
            for (int32_t i = 0; i < fields->nbFields; ++i) {
                PluginField const& field = fields->fields[i];
                std::string const bytes = field.type == PluginFieldType::kCHAR || field.type == PluginFieldType::kINT8
                    ? std::string(static_cast<char const*>(field.data), static_cast<std::size_t>(field.length))
                    : std::string();
                if (std::strcmp(field.name, kKernelsId) == 0) {
                    kernelsId = bytes.substr(0, bytes.find('\0'));
                } else if (std::strcmp(field.name, kKernels) == 0 && !bytes.empty()) {
                    blob = std::make_shared<std::string const>(bytes);
                }
            }
            if (blob != nullptr) {
                publish(kernelsId, blob);
            }
            std::vector<Value> values = parseFields(contract_, *fields);
            return new Plugin(
                contract_.ofNode(values), values, name, kernelsId, blob, phase == TensorRTPhase::kBUILD);
        });
    }

    PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
    char const* getPluginName() const noexcept override { return contract_.name; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

private:
    Contract const& contract_;
    std::vector<PluginField> fields_;
    PluginFieldCollection collection_{};
};

}  // namespace
}  // namespace lynx

LYNX_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static lynx::Creator select{lynx::selectContract()};
    static lynx::Creator experts{lynx::expertsContract()};
    static lynx::Creator causalConv{lynx::causalConvContract()};
    static lynx::Creator linearAttention{lynx::linearAttentionContract()};
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&select, &experts, &causalConv, &linearAttention};
    count = 4;
    return creators;
}

LYNX_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    lynx::gLoggerFinder = finder;
}
