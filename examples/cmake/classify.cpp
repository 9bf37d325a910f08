// Runs a network that `convgen compile --name net` has made, on numbers of its own, and says where each output is largest.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "net.h"

namespace {

void must(const char *what, int status)
{
    if (status != CONVGEN_OK)
        throw std::runtime_error(std::string(what) + ": " + net_error(status));
}

// What the library asks of the workspace, and what suits tensors as well.
struct Aligned {
    void operator()(void *memory) const { ::operator delete(memory, std::align_val_t{CONVGEN_ALIGNMENT}); }
};
using Buffer = std::unique_ptr<void, Aligned>;

Buffer buffer(std::size_t size) { return Buffer(::operator new(size, std::align_val_t{CONVGEN_ALIGNMENT})); }

// A network with its weights and threads. Any number of Runs may use one at once.
class Network {
public:
    Network(const char *weights, int threads) : threads_(threads)
    {
        must("check_cpu", net_check_cpu());
        convgen_network *opened = nullptr;
        must("open", net_open(weights, &opened));
        network_.reset(opened);
        if (threads > 1) {
            convgen_pool *created = nullptr;
            must("pool_create", net_pool_create(threads, &created));
            pool_.reset(created);
        }
    }

    const convgen_network *network() const { return network_.get(); }
    convgen_pool *pool() const { return pool_.get(); }
    int threads() const { return threads_; }

private:
    struct Close {
        void operator()(convgen_network *network) const { net_close(network); }
        void operator()(convgen_pool *pool) const { net_pool_destroy(pool); }
    };
    std::unique_ptr<convgen_network, Close> network_;
    std::unique_ptr<convgen_pool, Close> pool_;
    int threads_;
};

// The tensors and the workspace of one thread's calls, at the first size that the network was made for.
class Run {
public:
    explicit Run(const Network &network) : network_(network)
    {
        must("sizes", net_sizes(0, network.threads(), &sizes_));
        for (int i = 0; i < sizes_.inputs; ++i)
            add(inputs_, input_sizes_, net_inputs(0)[i].bytes);
        for (int i = 0; i < sizes_.outputs; ++i)
            add(outputs_, output_sizes_, net_outputs(0)[i].bytes);
        workspace_ = buffer(sizes_.workspace);
    }

    void operator()()
    {
        convgen_network_args args = {};
        args.inputs = inputs_.data();
        args.input_sizes = input_sizes_.data();
        args.outputs = outputs_.data();
        args.output_sizes = output_sizes_.data();
        args.workspace = workspace_.get();
        args.workspace_size = sizes_.workspace;
        args.pool = network_.pool();
        must("run", net_run(network_.network(), &args));
    }

    float *input(int i) { return static_cast<float *>(inputs_[i]); }
    const float *output(int i) const { return static_cast<const float *>(outputs_[i]); }
    int inputs() const { return sizes_.inputs; }
    int outputs() const { return sizes_.outputs; }

private:
    void add(std::vector<void *> &tensors, std::vector<std::size_t> &sizes, std::size_t size)
    {
        memory_.push_back(buffer(size));
        tensors.push_back(memory_.back().get());
        sizes.push_back(size);
    }

    const Network &network_;
    convgen_network_sizes sizes_ = {};
    std::vector<Buffer> memory_;
    std::vector<void *> inputs_, outputs_;
    std::vector<std::size_t> input_sizes_, output_sizes_;
    Buffer workspace_;
};

} // namespace

int main(int count, char **words)
try {
    const Network network(count > 1 ? words[1] : NET_WEIGHTS, 2);
    Run run(network);
    for (int i = 0; i < run.inputs(); ++i) {
        const std::size_t numbers = net_inputs(0)[i].bytes / sizeof(float);
        for (std::size_t k = 0; k < numbers; ++k)
            run.input(i)[k] = static_cast<float>(k % 17) / 8 - 1;
    }
    run();
    for (int i = 0; i < run.outputs(); ++i) {
        const convgen_value &output = net_outputs(0)[i];
        const float *values = run.output(i);
        const float *largest = std::max_element(values, values + output.bytes / sizeof(float));
        std::printf("%s: largest at %td: %.6g\n", output.name, largest - values, static_cast<double>(*largest));
    }
    return EXIT_SUCCESS;
} catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return EXIT_FAILURE;
}
