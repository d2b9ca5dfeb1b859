#include "bind/torch_shim.h"

#include <dlfcn.h>

#include <stdexcept>

#include "common/parallel.h"

namespace quernstone::shim {
namespace {

using Error = std::int32_t;

struct Api {
    Error (*init_fragment)(const char*, const char*, std::uint32_t, Handle*);
    Error (*init_impl)(const char*, const char*, const char*, std::uint32_t, Handle*);
    Error (*define)(Handle, const char*);
    Error (*implement)(Handle, const char*, Kernel);
    Error (*data)(Handle, void**);
    Error (*ndim)(Handle, std::int64_t*);
    Error (*shape)(Handle, std::int64_t**);
    Error (*strides)(Handle, std::int64_t**);
    Error (*dtype)(Handle, std::int32_t*);
    Error (*device)(Handle, std::int32_t*);
    Error (*empty)(std::int64_t, const std::int64_t*, const std::int64_t*, std::int32_t,
                   std::int32_t, std::int32_t, Handle*);
    Error (*release)(Handle);
    Error (*string_data)(Handle, const char**);
    Error (*string_release)(Handle);
    Error (*parallel_for)(std::int64_t, std::int64_t, std::int64_t, Pool::Body, void*);
    Error (*threads)(std::uint32_t*);
};

Api api{};
Handle fragment = nullptr;  // torch keeps pointing at both: never freed
Handle cpu_kernels = nullptr;

template <class F>
void resolve(void* library, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    if (function == nullptr) {
        throw std::runtime_error(std::string("this torch has no ") + name +
                                 "; quernstone needs torch >= 2.10");
    }
}

void must(Error error, const char* what) {
    if (error != 0) {
        throw std::runtime_error(std::string("torch refused: ") + what);
    }
}

}  // namespace

bool load(const std::string& libtorch_cpu) {
    if (fragment != nullptr) {
        return false;
    }
    void* library = dlopen(libtorch_cpu.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) {
        throw std::runtime_error("torch is not loaded from " + libtorch_cpu);
    }
    resolve(library, "aoti_torch_library_init_fragment", api.init_fragment);
    resolve(library, "aoti_torch_library_init_impl", api.init_impl);
    resolve(library, "aoti_torch_library_def", api.define);
    resolve(library, "aoti_torch_library_impl", api.implement);
    resolve(library, "aoti_torch_get_data_ptr", api.data);
    resolve(library, "aoti_torch_get_dim", api.ndim);
    resolve(library, "aoti_torch_get_sizes", api.shape);
    resolve(library, "aoti_torch_get_strides", api.strides);
    resolve(library, "aoti_torch_get_dtype", api.dtype);
    resolve(library, "aoti_torch_get_device_type", api.device);
    resolve(library, "aoti_torch_empty_strided", api.empty);
    resolve(library, "aoti_torch_delete_tensor_object", api.release);
    resolve(library, "torch_string_c_str", api.string_data);
    resolve(library, "torch_delete_string", api.string_release);
    resolve(library, "torch_parallel_for", api.parallel_for);
    resolve(library, "torch_get_num_threads", api.threads);
    must(api.init_fragment("quernstone", __FILE__, __LINE__, &fragment), "an operator namespace");
    must(api.init_impl("quernstone", "CPU", __FILE__, __LINE__, &cpu_kernels), "CPU kernels");
    pool().run = [](std::int64_t begin, std::int64_t end, std::int64_t grain, Pool::Body body,
                    void* context) {
        if (api.parallel_for(begin, end, grain, body, context) != 0) {
            body(begin, end, context);  // the pool would not: run what is left here
        }
    };
    pool().threads = [] {
        std::uint32_t n = 1;
        return api.threads(&n) == 0 ? static_cast<int>(n) : 1;
    };
    return true;
}

void define(const char* schema) { must(api.define(fragment, schema), schema); }

void implement_cpu(const char* name, Kernel kernel) {
    must(api.implement(cpu_kernels, name, kernel), name);
}

Tensor::~Tensor() {
    if (handle_ != nullptr) {
        api.release(handle_);
    }
}

void* Tensor::data() const {
    void* p = nullptr;
    must(api.data(handle_, &p), "a tensor's data");
    return p;
}

std::int64_t Tensor::ndim() const {
    std::int64_t n = 0;
    must(api.ndim(handle_, &n), "a tensor's rank");
    return n;
}

const std::int64_t* Tensor::shape() const {
    std::int64_t* p = nullptr;
    must(api.shape(handle_, &p), "a tensor's shape");
    return p;
}

const std::int64_t* Tensor::strides() const {
    std::int64_t* p = nullptr;
    must(api.strides(handle_, &p), "a tensor's strides");
    return p;
}

std::int32_t Tensor::dtype() const {
    std::int32_t code = 0;
    must(api.dtype(handle_, &code), "a tensor's dtype");
    return code;
}

bool Tensor::on_cpu() const {
    std::int32_t type = 0;
    must(api.device(handle_, &type), "a tensor's device");
    return type == 0;  // c10::DeviceType::CPU
}

Tensor empty(std::int64_t ndim, const std::int64_t* shape, std::int32_t dtype) {
    constexpr std::int64_t kMaxRank = 4;
    std::array<std::int64_t, kMaxRank> strides{};
    std::int64_t stride = 1;
    for (std::int64_t i = ndim - 1; i >= 0; --i) {
        strides[static_cast<std::size_t>(i)] = stride;
        stride *= shape[i] > 0 ? shape[i] : 1;
    }
    Handle handle = nullptr;
    if (api.empty(ndim, shape, strides.data(), dtype, 0, 0, &handle) != 0) {
        throw std::runtime_error("out of memory: torch has no room for an output of " +
                                 std::to_string(stride) + " elements");
    }
    return Tensor(handle);
}

const char* dtype_name(std::int32_t code) {
    constexpr std::array<const char*, 16> kNames = {
        "torch.uint8",     "torch.int8",      "torch.int16",      "torch.int32",
        "torch.int64",     "torch.float16",   "torch.float32",    "torch.float64",
        "torch.complex32", "torch.complex64", "torch.complex128", "torch.bool",
        "torch.qint8",     "torch.quint8",    "torch.qint32",     "torch.bfloat16"};
    const auto i = static_cast<std::size_t>(code);
    return i < kNames.size() ? kNames[i] : "another dtype";
}

std::string take_string(Boxed slot) {
    auto* handle = reinterpret_cast<Handle>(slot);
    const char* text = nullptr;
    const Error error = api.string_data(handle, &text);
    std::string copy = error == 0 && text != nullptr ? text : "";
    api.string_release(handle);
    must(error, "a string argument");
    return copy;
}

}  // namespace quernstone::shim
