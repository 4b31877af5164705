// The program around emulated kernels. It reads buffers and launches from standard input, runs the launches, and writes
// the buffers to standard output. The other side is kernels/tests/common/emulator.rs.
//
// All numbers are little-endian u64: seed; number of buffers, of each its length and bytes; number
// of launches, of each: length and bytes of the kernel's name; grid x, y, z; block x, y, z; bytes of dynamic
// shared memory; number of arguments, of each the number of pieces, of each: 0, length, bytes; or
// 1, buffer, offset: a pointer. Pieces lie at multiples of their size, as fields of a struct do.
#pragma once

namespace emulator {

struct Kernel {
    const char *name;
    void (*launch)(const std::vector<std::vector<u8>> &);
};

inline void run_grid() {
    const u64 blocks = u64(gridDim.x) * gridDim.y * gridDim.z;
    std::vector<u64> order(blocks);
    for (u64 i = 0; i < blocks; ++i)
        order[i] = i;
    for (u64 i = blocks; random_order && i > 1; --i)
        std::swap(order[i - 1], order[random() % i]);
    for (u64 i : order) {
        blockIdx = {unsigned(i % gridDim.x), unsigned(i / gridDim.x % gridDim.y),
                    unsigned(i / gridDim.x / gridDim.y)};
        run_block();
    }
}

template <class> struct Call;
template <class... T> struct Call<void (*)(T...)> {
    inline static std::tuple<std::decay_t<T>...> *arguments = nullptr;
    template <std::size_t... I>
    static void read(std::tuple<std::decay_t<T>...> &to, const std::vector<std::vector<u8>> &from,
                     std::index_sequence<I...>) {
        (one(std::get<I>(to), from[I], I), ...);
    }
    template <class A> static void one(A &to, const std::vector<u8> &from, std::size_t i) {
        if (from.size() > sizeof(A) || from.size() + 8 <= sizeof(A))
            fail("argument %zu has %zu bytes, %zu were given", i, sizeof(A), from.size());
        std::memcpy(static_cast<void *>(&to), from.data(), from.size());
    }
};

template <auto K> void launch(const std::vector<std::vector<u8>> &bytes) {
    using C = Call<decltype(K)>;
    std::decay_t<decltype(*C::arguments)> arguments{};
    constexpr std::size_t n = std::tuple_size_v<decltype(arguments)>;
    if (bytes.size() != n)
        fail("the kernel has %zu arguments, %zu were given", n, bytes.size());
    C::read(arguments, bytes, std::make_index_sequence<n>());
    C::arguments = &arguments;
    entry = [] { std::apply(K, *C::arguments); };
    run_grid();
}

inline void input(void *to, std::size_t n) {
    if (std::fread(to, 1, n, stdin) != n) {
        std::fprintf(stderr, "emulator: the input ends early\n");
        std::exit(2);
    }
}
inline u64 number() {
    u64 v;
    input(&v, 8);
    return v;
}

inline int run(const std::vector<Kernel> &kernels) {
    seed = number();
    random_order = seed != 0;
    struct Buffer {
        u8 *data;
        u64 size;
    };
    std::vector<Buffer> buffers(number());
    for (auto &b : buffers) {
        b.size = number();
        void *p = nullptr;
        if (posix_memalign(&p, 256, b.size ? b.size : 1))
            return 2;
        b.data = static_cast<u8 *>(p);
        input(b.data, b.size);
    }
    for (u64 launches = number(); launches > 0; --launches) {
        std::string name(number(), ' ');
        input(name.data(), name.size());
        kernel_name = name.c_str();
        auto u = [] { return unsigned(number()); };
        gridDim.x = u(), gridDim.y = u(), gridDim.z = u();
        blockDim.x = u(), blockDim.y = u(), blockDim.z = u();
        dynamic_shared_bytes = number();
        if (blockDim.x * blockDim.y * blockDim.z > 1024 || dynamic_shared_bytes > 227 << 10 ||
            gridDim.y > 65535 || gridDim.z > 65535)
            fail("no GPU can launch this");
        std::vector<std::vector<u8>> arguments(number());
        for (auto &bytes : arguments) {
            auto align = [&](std::size_t n) {
                while (n > 1 && bytes.size() % n != 0)
                    bytes.push_back(0);
            };
            for (u64 pieces = number(); pieces > 0; --pieces) {
                if (number() == 0) {
                    const u64 n = number();
                    align(n == 2 || n == 4 || n == 8 || n == 16 ? n : 1);
                    bytes.resize(bytes.size() + n);
                    input(bytes.data() + bytes.size() - n, n);
                } else {
                    align(8);
                    const u64 buffer = number(), offset = number();
                    u8 *p = buffer < buffers.size() ? buffers[buffer].data + offset : nullptr;
                    bytes.resize(bytes.size() + 8);
                    std::memcpy(bytes.data() + bytes.size() - 8, &p, 8);
                }
            }
        }
        const Kernel *found = nullptr;
        for (auto &k : kernels)
            if (name == k.name)
                found = &k;
        if (!found)
            fail("no such kernel in this program");
        found->launch(arguments);
    }
    for (auto &b : buffers)
        std::fwrite(b.data, 1, b.size, stdout);
    return std::fflush(stdout) == 0 ? 0 : 2;
}

} // namespace emulator

#define STB_EMULATED_KERNEL(name) emulator::Kernel{#name, emulator::launch<&name>}
