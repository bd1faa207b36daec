// The kernels that an engine carries: the blob that plugins/blob.py writes, and the plans of plugins/plan.py in it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace lynx {

struct Cubin {
    int64_t sm;
    std::string function;
    std::string entry;
    int64_t threads;
    int64_t shared;
    int64_t scratch;
    char const* image;
    std::size_t size;
};

// A number of programs: per * (fixed + min(cap, T * slots) + ceil(T * times / over) + B * sequences).
struct Grid {
    int64_t fixed, per, cap, slots, times, over, perMultiprocessor, sequences;

    int64_t programs(int64_t tokens, int64_t multiprocessors, int64_t sequenceCount) const;
};

// A part of the workspace: fixed + per * ceil(T / tokens) bytes.
struct Region {
    std::string name;
    int64_t fixed, per, tokens;

    int64_t alignedSize(int64_t tokenCount) const;
};

struct Step {
    std::size_t cubin;
    Grid grid;
    bool programmatic;  // it may start while the launch before it runs: its kernel waits itself
    bool cluster;       // its programs are one thread block cluster
    std::vector<std::string> arguments;
};

struct Plan {
    int64_t maxTokens;
    std::vector<Region> regions;
    std::vector<Step> steps;

    std::map<std::string, int64_t> offsets(int64_t tokens) const;
    int64_t workspaceBytes(int64_t tokens) const;
};

class Kernels {
public:
    // Throws std::runtime_error: it is no blob of this version.
    explicit Kernels(std::shared_ptr<std::string const> blob);
    Kernels(Kernels const&) = delete;  // cubins point into the blob, and are known by their address
    Kernels& operator=(Kernels const&) = delete;

    // The plan for T tokens of an op on a GPU, of B sequences where they have states (else 0). Throws
    // std::runtime_error: there is none; it names the SMs.
    Plan const& plan(std::string const& key, int64_t sm, int64_t tokens, int64_t sequences) const;
    // The workspace of an op for up to that many tokens, on any SM that there are kernels for.
    int64_t workspaceBytes(std::string const& key, int64_t maxTokens) const;
    Cubin const& cubin(std::size_t number) const { return cubins_[number]; }

private:
    using BySm = std::map<int64_t, std::vector<Plan>>;

    BySm const& op(std::string const& key) const;
    bool runsOn(int64_t built, int64_t sm) const;
    void readLine(std::string const& line, char const* images, std::size_t size);

    std::shared_ptr<std::string const> blob_;
    bool before_ = false;  // of a format whose grids have no number of sequences
    std::vector<Cubin> cubins_;
    std::map<std::string, BySm> ops_;
    BySm* current_ = nullptr;    // the op and the plan that the lines being read belong to
    Plan* plan_ = nullptr;
};

// One node of an engine carries the kernels; it publishes them to the process, for its lifetime, under their id. Every
// node looks its own up when it first needs them, so the order in which nodes are made does not matter.
void publish(std::string const& id, std::shared_ptr<std::string const> blob);
// Throws std::runtime_error: no node has brought them.
Kernels const& published(std::string const& id);

}  // namespace lynx
