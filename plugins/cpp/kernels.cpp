#include "kernels.h"

#include <algorithm>
#include <iterator>
#include <mutex>
#include <set>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace lynx {
namespace {

// Of plugins/plan.py and plugins/launch.py.
constexpr int64_t kAlignment = 256;
constexpr int64_t kMostPrograms = 1024;
// Of SM 86 to 89, which run the kernels of a lower SM 8 if they need no more than this.
constexpr int64_t kSharedMemory86 = 101376;
constexpr char kFormat[] = "lynx-kernels 4 ";
constexpr char const* kBefore[] = {"lynx-kernels 2 ", "lynx-kernels 3 "};
// Of plugins/blob.py.
constexpr int64_t kProgrammatic = 1, kCluster = 2;

int64_t ceilDivide(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

[[noreturn]] void damaged(std::string const& why) {
    throw std::runtime_error(
        "this engine's GPU kernels can't be read (" + why + "): build it again with this version of lynx-trt");
}

}  // namespace

int64_t Grid::programs(int64_t tokens, int64_t multiprocessors, int64_t sequenceCount) const {
    int64_t const items =
        fixed + std::min(cap, tokens * slots) + ceilDivide(tokens * times, over) + sequenceCount * sequences;
    if (perMultiprocessor == 0) {
        return per * items;
    }
    return std::min({per * items, perMultiprocessor * multiprocessors, kMostPrograms});
}

int64_t Region::alignedSize(int64_t tokenCount) const {
    return ceilDivide(fixed + per * ceilDivide(tokenCount, tokens), kAlignment) * kAlignment;
}

std::map<std::string, int64_t> Plan::offsets(int64_t tokens) const {
    std::map<std::string, int64_t> places;
    int64_t end = 0;
    for (Region const& region : regions) {
        places[region.name] = end;
        end += region.alignedSize(tokens);
    }
    return places;
}

int64_t Plan::workspaceBytes(int64_t tokens) const {
    int64_t sum = 0;
    for (Region const& region : regions) {
        sum += region.alignedSize(tokens);
    }
    return sum;
}

Kernels::Kernels(std::shared_ptr<std::string const> blob) : blob_(std::move(blob)) {
    std::size_t const end = blob_->find('\n');
    auto const begins = [&](char const* format) { return blob_->compare(0, sizeof(kFormat) - 1, format) == 0; };
    before_ = std::any_of(std::begin(kBefore), std::end(kBefore), begins);
    if (!(begins(kFormat) || before_) || end == std::string::npos) {
        damaged("they are of another format");
    }
    std::size_t const size = std::stoull(blob_->substr(sizeof(kFormat) - 1, end));
    if (size > blob_->size() - end - 1) {
        damaged("they are cut off");
    }
    char const* const images = blob_->data() + end + 1 + size;
    std::istringstream text(blob_->substr(end + 1, size));
    for (std::string line; std::getline(text, line);) {
        readLine(line, images, blob_->size() - end - 1 - size);
    }
}

void Kernels::readLine(std::string const& line, char const* images, std::size_t size) {
    std::istringstream words(line);
    std::string kind, name;
    words >> kind;
    if (kind == "cubin") {
        Cubin cubin{};
        int64_t registers = 0, spills = 0;
        std::size_t offset = 0, length = 0;
        words >> cubin.sm >> cubin.function >> cubin.entry >> cubin.threads >> cubin.shared >> cubin.scratch >>
            registers >> spills >> offset >> length;
        if (!words || offset > size || length > size - offset) {
            damaged("a cubin is cut off");
        }
        cubin.image = images + offset;
        cubin.size = length;
        cubins_.push_back(std::move(cubin));
    } else if (kind == "op") {
        words >> name;
        current_ = &ops_[name];
    } else if (kind == "plan" && current_ != nullptr) {
        int64_t sm = 0;
        Plan plan{};
        words >> sm >> plan.maxTokens;
        std::vector<Plan>& options = (*current_)[sm];
        options.push_back(std::move(plan));
        plan_ = &options.back();
    } else if (kind == "region" && plan_ != nullptr) {
        Region region{};
        words >> region.name >> region.fixed >> region.per >> region.tokens;
        plan_->regions.push_back(std::move(region));
    } else if (kind == "step" && plan_ != nullptr) {
        Step step{};
        Grid& grid = step.grid;
        int64_t how = 0;
        words >> step.cubin >> grid.fixed >> grid.per >> grid.cap >> grid.slots >> grid.times >> grid.over >>
            grid.perMultiprocessor;
        if (!before_) {
            words >> grid.sequences;
        }
        words >> how;
        if (!words || step.cubin >= cubins_.size()) {
            damaged("a step has no cubin");
        }
        step.programmatic = (how & kProgrammatic) != 0;
        step.cluster = (how & kCluster) != 0;
        for (std::string argument; words >> argument;) {
            step.arguments.push_back(argument);
        }
        plan_->steps.push_back(std::move(step));
        return;  // reading until nothing is left has set the stream's failure bit
    } else if (kind != "versions") {
        damaged("a line begins with " + kind);
    }
    if (!words) {
        damaged("a line is incomplete: " + line);
    }
}

Kernels::BySm const& Kernels::op(std::string const& key) const {
    auto const found = ops_.find(key);
    if (found == ops_.end()) {
        throw std::runtime_error("this engine has no kernels for " + key + ": build it again");
    }
    return found->second;
}

bool Kernels::runsOn(int64_t built, int64_t sm) const {
    if (built == sm) {
        return true;
    }
    return built / 10 == 8 && sm / 10 == 8 && built < sm &&
        std::all_of(cubins_.begin(), cubins_.end(),
            [&](Cubin const& cubin) { return cubin.sm != built || cubin.shared <= kSharedMemory86; });
}

Plan const& Kernels::plan(std::string const& key, int64_t sm, int64_t tokens, int64_t sequences) const {
    std::set<int64_t> built;
    std::string names;
    int64_t best = 0;
    for (Cubin const& cubin : cubins_) {
        built.insert(cubin.sm);
    }
    for (int64_t each : built) {
        names += (names.empty() ? "" : ", ") + std::to_string(each);
        best = runsOn(each, sm) ? std::max(best, each) : best;
    }
    if (best == 0) {
        throw std::runtime_error("this engine's kernels are for SM " + (names.empty() ? "no GPU at all" : names) +
            ", and this GPU is SM " + std::to_string(sm) + ": build it again with --sm " + std::to_string(sm));
    }
    std::vector<Plan> const& options = op(key).at(best);
    int64_t const longest = sequences > 0 ? tokens / sequences : tokens;
    for (Plan const& plan : options) {
        if (longest <= plan.maxTokens) {
            return plan;
        }
    }
    throw std::runtime_error((sequences > 0 ? "a sequence of " : "a batch of ") + std::to_string(longest) + " tokens: the kernels are made for up to " +
        std::to_string(options.empty() ? 0 : options.back().maxTokens) + ": build the engine again with larger profiles");
}

int64_t Kernels::workspaceBytes(std::string const& key, int64_t maxTokens) const {
    int64_t most = 0;
    for (auto const& [sm, options] : op(key)) {
        for (Plan const& plan : options) {
            bool const ofSequences = std::any_of(
                plan.steps.begin(), plan.steps.end(), [](Step const& step) { return step.grid.sequences != 0; });
            int64_t const tokens = ofSequences ? maxTokens : std::min(plan.maxTokens, maxTokens);
            most = std::max(most, plan.workspaceBytes(tokens));
        }
    }
    return most;
}

namespace {

struct Registry {
    std::mutex mutex;
    std::map<std::string, std::shared_ptr<std::string const>> blobs;
    std::map<std::string, std::unique_ptr<Kernels>> parsed;
};

Registry& registry() {
    static auto* const instance = new Registry;  // never destroyed: plugins may outlive static objects
    return *instance;
}

}  // namespace

void publish(std::string const& id, std::shared_ptr<std::string const> blob) {
    std::lock_guard<std::mutex> const lock(registry().mutex);
    registry().blobs.emplace(id, std::move(blob));
}

Kernels const& published(std::string const& id) {
    std::lock_guard<std::mutex> const lock(registry().mutex);
    std::unique_ptr<Kernels>& kernels = registry().parsed[id];
    if (kernels == nullptr) {
        auto const blob = registry().blobs.find(id);
        if (blob == registry().blobs.end()) {
            throw std::runtime_error("the GPU kernels " + id.substr(0, 12) +
                " are in none of the engines loaded here: the engine is not whole, or another program made it; build "
                "it again");
        }
        kernels = std::make_unique<Kernels>(blob->second);
    }
    return *kernels;
}

}  // namespace lynx
