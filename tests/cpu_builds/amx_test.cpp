// amx_emulated.h by itself: products of every shape of tile against plain sums of numbers that are exact, what tiles read
// and write, and by an argument one misuse, which has to end the process.
#include <vector>

namespace {

struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

Config shapes(int m, int k, int n) {  // tiles 0: C [m, n], 1: A [m, 2 k], 2: B [2 k, n] as pairs
    Config config;
    config.rows[0] = config.rows[1] = m, config.rows[2] = k;
    config.bytes[0] = config.bytes[2] = 4 * n, config.bytes[1] = 4 * k;
    return config;
}

uint16_t bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return static_cast<uint16_t>(u >> 16);
}

void check(bool right, const char *what, int m = 0, int k = 0, int n = 0) {
    if (!right) {
        printf("%s, %d %d %d\n", what, m, k, n);
        exit(1);
    }
}

void product(int m, int k, int n) {
    const Config config = shapes(m, k, n);
    _tile_loadconfig(&config);
    // Exactly the memory that the tiles' shapes have, rows apart by more than their bytes: AddressSanitizer watches the rest.
    const int64_t a_stride = 4 * k + 6, b_stride = 4 * n + 2, c_stride = 4 * n + 8;
    std::vector<uint8_t> a((m - 1) * a_stride + 4 * k), b((k - 1) * b_stride + 4 * n), c((m - 1) * c_stride + 4 * n, 0xcc);
    const auto left = [](int row, int i) { return static_cast<float>((row * 7 + i * 3) % 11 - 5); };
    const auto right = [](int i, int col) { return static_cast<float>((i * 5 + col) % 13 - 6); };
    const auto place = [](std::vector<uint8_t> &to, int64_t at, const auto &value) { memcpy(&to[at], &value, sizeof value); };
    for (int i = 0; i < 2 * k; ++i) {
        for (int row = 0; row < m; ++row)
            place(a, row * a_stride + 2 * i, bf16(left(row, i)));
        for (int col = 0; col < n; ++col)
            place(b, i / 2 * b_stride + 4 * col + i % 2 * 2, bf16(right(i, col)));
    }
    for (int row = 0; row < m; ++row)
        for (int col = 0; col < n; ++col)
            place(c, row * c_stride + 4 * col, static_cast<float>(row - col));
    std::vector<uint8_t> wanted = c;
    for (int row = 0; row < m; ++row)
        for (int col = 0; col < n; ++col) {
            float sum = static_cast<float>(row - col);
            for (int i = 0; i < 2 * k; ++i)
                sum += left(row, i) * right(i, col);
            place(wanted, row * c_stride + 4 * col, sum);
        }
    _tile_loadd(0, c.data(), c_stride);
    _tile_loadd(1, a.data(), a_stride);
    _tile_loadd(2, b.data(), b_stride);
    _tile_dpbf16ps(0, 1, 2);
    _tile_stored(0, c.data(), c_stride);
    check(c == wanted, "a product, or what lies between its rows", m, k, n);
    _tile_zero(0);
    _tile_stored(0, c.data(), c_stride);
    float first;
    memcpy(&first, c.data(), 4);
    check(first == 0, "zeros", m, k, n);
}

// One number of C, of one pair of A and one of B.
float one(float c, float a0, float b0, float a1, float b1) {
    const Config config = shapes(1, 1, 1);
    _tile_loadconfig(&config);
    const uint16_t a[] = {bf16(a0), bf16(a1)}, b[] = {bf16(b0), bf16(b1)};
    _tile_loadd(0, &c, 4);
    _tile_loadd(1, a, 4);
    _tile_loadd(2, b, 4);
    _tile_dpbf16ps(0, 1, 2);
    _tile_stored(0, &c, 4);
    return c;
}

}  // namespace

int main(int, char **arguments) {
    const int misuse = arguments[1] ? atoi(arguments[1]) : 0;
    Config config = shapes(16, 16, 16);
    alignas(64) static uint8_t memory[16 * 64];
    if (misuse == 2)
        config.palette = 2;
    if (misuse == 3)
        config.rows[1] = 8;
    if (misuse == 4)
        config.rows[2] = 8;
    if (misuse == 5)
        config.bytes[0] = 32;
    if (misuse == 6)
        config.bytes[3] = 65, config.rows[3] = 1;
    if (misuse == 7)
        config.rows[8] = 1, config.bytes[8] = 4;
    if (misuse) {
        if (misuse != 1)
            _tile_loadconfig(&config);
        if (misuse == 8)
            _tile_release();
        _tile_loadd(0, memory, 64);
        _tile_loadd(1, memory, 64);
        _tile_loadd(2, memory, 64);
        if (misuse == 9)
            _tile_loadd(3, memory, 64);
        if (misuse == 10)
            _tile_loadd(2, memory + 1, 64);  // one byte beyond the last row, which AddressSanitizer sees
        _tile_dpbf16ps(0, 1, 2);
        return 0;
    }
    int64_t shapes = 0;
    for (int m = 1; m <= 16; ++m)
        for (int k = 1; k <= 16; ++k)
            for (int n = 1; n <= 16; ++n, ++shapes)
                product(m, k, n);
    check(nf4lora_amx_products == shapes, "the count of products");
    const float tiny = 0x1p-127f, one_and = 1 + 0x1p-7f;
    check(one(0, tiny, 0x1p100f, 0, 0) == 0, "a denormal of A counts as 0");
    check(one(tiny, 0, 0, 0, 0) == 0, "a denormal of C counts as 0");
    check(one(0, 0x1p-70f, 0x1p-57f, 0, 0) == 0, "a denormal product is flushed");
    check(one(0, one_and, one_and, 0, 0) == one_and * one_and, "a product is not rounded to bf16");
    check(one(0x1p24f, 1, 1, 1, 1) == 0x1p24f + 2, "the pair is summed before it joins C");
    check(one(-0x1p30f, 0x1p15f, 0x1p15f, 0x1p-10f, 1) == 0, "and rounded");
    printf("%lld shapes\n", static_cast<long long>(shapes));
}
