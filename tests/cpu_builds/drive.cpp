// Every op of the C ABI, on operands whose memory has exactly their bytes (packed codes at an odd address), with 1, 2, 3 and
// 8 threads, and from two threads at once: the bytes that one thread gives. Without torch or Python, so that a sanitizer
// sees every thread. Arguments: how many LinearPaths there are. Prints the instruction set and how many calls were compared.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "api.h"

using namespace nf4lora;

namespace {

using Bytes = std::vector<uint8_t>;

struct Shape {
    int64_t M, N, K, r;
    int32_t dtype;
    bool nested, dropout;
    int32_t quant_type;
};

uint32_t random_word(uint64_t &state) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
}

int64_t size_of(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

// Numbers of moderate size; an fp16 is made from the bits of one between 2^-8 and 2.
Bytes numbers(int64_t count, int32_t dtype, uint64_t seed) {
    Bytes bytes(count * size_of(dtype));
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t word = random_word(seed);
        const float f = (static_cast<float>(word % 2001) - 1000) / 700;
        uint32_t bits;
        memcpy(&bits, &f, 4);
        const uint16_t half = dtype == kBFloat16 ? bits >> 16 : (word & 0x83ff) | (7 + word % 9) << 10;
        if (dtype == kFloat32)
            memcpy(&bytes[4 * i], &f, 4);
        else
            memcpy(&bytes[2 * i], &half, 2);
    }
    return bytes;
}

void check(const char *message) {
    if (!message)
        return;
    fprintf(stderr, "%s\n", message);
    exit(1);
}

// Everything an op reads; made before any other thread, and read by all.
struct Case {
    Shape s;
    Bytes x, dy, A, B, bias, dyb, xa, weight, gate_up, param, grad;
    Bytes packed, absmax, codes, nested_absmax;
    float offset = 0.1f;
    int64_t seed = 7, nblocks, blocksize = 64, numel;

    explicit Case(const Shape &shape) : s(shape), numel(s.N * s.K) {
        x = numbers(s.M * s.K, s.dtype, 1), dy = numbers(s.M * s.N, s.dtype, 2), A = numbers(s.r * s.K, kFloat32, 3);
        B = numbers(s.N * s.r, s.dtype, 4), bias = numbers(s.N, s.dtype, 5), dyb = numbers(s.M * s.r, s.dtype, 6);
        xa = numbers(s.M * s.r, s.dtype, 7), weight = numbers(numel, s.dtype, 8), gate_up = numbers(2 * s.M * s.N, s.dtype, 9);
        param = numbers(numel, s.dtype, 10), grad = numbers(numel, s.dtype, 11);
        nblocks = (numel + blocksize - 1) / blocksize;
        packed.resize(1 + (numel + 1) / 2), absmax.resize(4 * nblocks), codes.resize(nblocks);
        nested_absmax.resize(4 * ((nblocks + 255) / 256));
        quantize(1, packed.data() + 1, absmax.data());
        const QuantizeAbsmaxParams p{reinterpret_cast<const float *>(absmax.data()), &offset, codes.data(),
                                     reinterpret_cast<float *>(nested_absmax.data()), nblocks, 256};
        check(nf4lora_cpu_quantize_absmax(&p));
    }

    void quantize(int32_t threads, uint8_t *codes, uint8_t *scales) const {
        const QuantizeParams p{weight.data(), codes, reinterpret_cast<float *>(scales), numel, blocksize, s.dtype, s.quant_type, threads};
        check(nf4lora_cpu_quantize(&p));
    }

    Weight w() const {
        return {packed.data() + 1, s.nested ? codes.data() : absmax.data(),
                s.nested ? reinterpret_cast<const float *>(nested_absmax.data()) : nullptr, s.nested ? &offset : nullptr,
                s.N, s.K, blocksize, 256, s.quant_type};
    }

    Dropout dropout() const { return {s.dropout ? &seed : nullptr, 0.3f}; }

    int64_t bytes(int64_t rows, int64_t cols) const { return rows * cols * size_of(s.dtype); }

    // What every op gives, one after the other.
    std::vector<Bytes> run(int32_t threads, LinearConfig config) const {
        config.threads = threads;
        Bytes quantized((numel + 1) / 2), scales(4 * nblocks), decoded(bytes(s.N, s.K));
        quantize(threads, quantized.data(), scales.data());
        const DequantizeParams dequantize{w(), decoded.data(), s.dtype, threads};
        check(nf4lora_cpu_dequantize(&dequantize));

        Bytes y(bytes(s.M, s.N)), down(bytes(s.M, s.r));
        const LinearFwdParams forward{
            w(), x.data(), bias.data(), s.r ? A.data() : nullptr, s.r ? B.data() : nullptr, y.data(), down.data(), s.M, s.r, s.N, s.r, 0.5f,
            s.dtype, s.dtype, kFloat32, s.dtype, dropout(), config};
        check(nf4lora_cpu_linear_fwd(&forward));

        Bytes dx(bytes(s.M, s.K)), up(bytes(s.M, s.r)), dA(4 * s.r * s.K), dB(bytes(s.N, s.r));
        LinearBwdParams backward{};
        backward.member[0].w = w(), backward.member[0].dy = dy.data(), backward.member[0].ld_dy = s.N;
        backward.member[0].r = s.r, backward.member[0].lora_A = s.r ? A.data() : nullptr;
        backward.dyb = s.r ? dyb.data() : nullptr, backward.dx = dx.data(), backward.count = 1, backward.M = s.M;
        backward.dy_dtype = s.dtype, backward.A_dtype = kFloat32, backward.dropout = dropout(), backward.config = config;
        check(nf4lora_cpu_linear_bwd(&backward));
        if (s.r) {
            LoraBwdParams p{};
            p.dy = dy.data(), p.x = x.data(), p.xa = xa.data(), p.lora_B = B.data(), p.dyb = up.data(), p.dA = dA.data();
            p.dB = dB.data(), p.M = s.M, p.N = s.N, p.K = s.K, p.r = s.r, p.ld_dy = s.N, p.ld_xa = p.ld_dyb = s.r;
            p.scaling = 0.5f, p.dtype = p.B_dtype = s.dtype, p.A_dtype = kFloat32, p.dropout = dropout(), p.config = config;
            check(nf4lora_cpu_lora_bwd(&p));
        }
        Bytes h(bytes(s.M, s.N)), d_gate_up(bytes(s.M, 2 * s.N));
        const SwigluParams swiglu{gate_up.data(), nullptr, h.data(), s.M, s.N, s.dtype, threads};
        const SwigluParams unswiglu{gate_up.data(), dy.data(), d_gate_up.data(), s.M, s.N, s.dtype, threads};
        check(nf4lora_cpu_swiglu_fwd(&swiglu));
        check(nf4lora_cpu_swiglu_bwd(&unswiglu));
        std::vector<Bytes> all{quantized, scales, decoded, y, down, dx, up, dA, dB, h, d_gate_up};
        for (const int32_t kind : {kAdamW, kLion})
            for (const bool eight_bit : {false, true})
                for (Bytes &bytes : step(threads, kind, eight_bit))
                    all.push_back(std::move(bytes));
        return all;
    }

    // One tensor cut in two that share no block, a check of their gradients and a step.
    std::vector<Bytes> step(int32_t threads, int32_t kind, bool eight_bit) const {
        const int64_t first = numel / 2, offset = (first + 255) / 256 * 256, blocks = offset / 256 + (numel - first + 255) / 256;
        const int64_t split = first * size_of(s.dtype);
        Bytes half(param.begin(), param.begin() + split), rest(param.begin() + split, param.end());
        const OptimTensor tensors[] = {{half.data(), grad.data(), first, 0, 0, 0}, {rest.data(), grad.data() + split, numel - first, offset, 0, 1}};
        const OptimHyper hyper{1e-2, 0.9, 0.99, 1e-8, 0.1, 1};
        const int64_t state = (offset + numel - first) * (eight_bit ? 1 : 4);
        Bytes m(state, eight_bit ? 127 : 0), v(kind == kLion ? 0 : state), m_absmax(4 * blocks), v_absmax(kind == kLion ? 0 : 4 * blocks);
        int32_t steps[] = {0, 4}, flag = -1;
        const OptimCheckParams checked{tensors, steps, &flag, nullptr, 2, s.dtype, threads};
        check(nf4lora_cpu_optim_check(&checked));
        OptimParams p{};
        p.tensors = tensors, p.hypers = &hyper, p.state1 = m.data(), p.state2 = kind == kLion ? nullptr : v.data();
        p.absmax1 = eight_bit ? reinterpret_cast<float *>(m_absmax.data()) : nullptr;
        p.absmax2 = eight_bit && kind != kLion ? reinterpret_cast<float *>(v_absmax.data()) : nullptr;
        p.steps = steps, p.flag = &flag, p.count = 2, p.hyper_count = 1, p.seed = 3, p.stochastic = s.dtype == kBFloat16;
        p.dtype = s.dtype, p.kind = kind, p.workers = threads;
        check(nf4lora_cpu_optim_step(&p));
        Bytes counted(sizeof steps + sizeof flag);
        memcpy(counted.data(), steps, sizeof steps), memcpy(counted.data() + sizeof steps, &flag, sizeof flag);
        return {half, rest, m, v, m_absmax, v_absmax, counted};
    }
};

int64_t compared = 0;

void compare(const std::vector<Bytes> &found, const std::vector<Bytes> &wanted, const Shape &s, int threads, int32_t path) {
    for (size_t i = 0; i < wanted.size(); ++i, ++compared)
        if (found[i] != wanted[i]) {
            fprintf(stderr, "output %zu differs, M %d, dtype %d, path %d, %d threads\n", i, static_cast<int>(s.M), s.dtype, path, threads);
            exit(1);
        }
}

}  // namespace

int main(int, char **arguments) {
    const Shape shapes[] = {
        {0, 70, 130, 5, kBFloat16, true, false, kNF4}, {1, 70, 130, 0, kBFloat16, false, false, kNF4},
        {1, 67, 192, 16, kBFloat16, true, false, kFP4}, {9, 67, 129, 3, kFloat16, true, true, kNF4},
        {17, 96, 64, 16, kBFloat16, false, true, kNF4}, {40, 70, 130, 5, kFloat32, true, true, kNF4},
        {67, 33, 257, 16, kBFloat16, true, false, kNF4}, {5, 131, 320, 8, kFloat16, false, false, kFP4},
        {24, 67, 2240, 3, kBFloat16, true, false, kNF4},
    };
    for (const Shape &shape : shapes) {
        const Case made(shape);
        for (int32_t path = 0; path < atoi(arguments[1]); ++path) {
            const LinearConfig small{path, 8, 16, 64, 1}, usual{path, 66, 128, 256, 1};
            for (const LinearConfig &config : {small, usual}) {
                const std::vector<Bytes> wanted = made.run(1, config);
                for (const int threads : {2, 3, 8})
                    compare(made.run(threads, config), wanted, shape, threads, path);
                std::vector<Bytes> here, there;
                std::thread other([&] { there = made.run(3, config); });
                here = made.run(2, config);
                other.join();
                compare(here, wanted, shape, 2, path);
                compare(there, wanted, shape, 3, path);
            }
        }
    }
    printf("%s %lld\n", nf4lora_cpu_isa(), static_cast<long long>(compared));
}
