#include <map>
#include <mutex>

#include "bind/moe_runtime.h"
#include "bind/torch_view.h"

// quernstone::moe_step: a layer of a runtime on an emulated device, without Python between a model
// and the plan. The device waits for each call of Python, and after a pause each takes long.
namespace quernstone::bind {
namespace {

namespace py = pybind11;
using shim::Boxed;
using shim::Tensor;

constexpr const char* kSchema =
    "moe_step(Tensor x, Tensor ids, Tensor weights, Tensor? scores, int step) -> Tensor";

// What of a step is always the same. The operator knows it by a number, while it lives.
class Step {
   public:
    Step(Runtime& runtime, Emulated& device, std::int64_t layer, const moe::Experts& layout,
         const Array<std::uint8_t>& packed, const std::string& compute)
        : runtime_(&runtime),
          device_(&device),
          layer_(layer),
          experts_(layout),
          packed_(packed),
          compute_(parse_compute(compute)) {
        experts_.data = packed_bytes(packed, layout.bytes(), "packed");
        const std::lock_guard lock(mutex());
        static std::int64_t last = 0;
        number_ = ++last;
        known().emplace(number_, this);
    }
    ~Step() {
        const std::lock_guard lock(mutex());
        known().erase(number_);
    }
    Step(const Step&) = delete;
    Step& operator=(const Step&) = delete;

    [[nodiscard]] std::int64_t number() const noexcept { return number_; }

    static Step& of(std::int64_t number) {
        const std::lock_guard lock(mutex());
        const auto found = known().find(number);
        if (found == known().end()) {
            raise(invalid("step", number, "that of an open runtime"));
        }
        return *found->second;
    }

    [[nodiscard]] Tensor operator()(const Tensor& x, const Tensor& ids, const Tensor& weights,
                                    const std::optional<Tensor>& scores) {
        bind::expect(x, "x.device", "x.ndim", 2);
        bind::expect(ids, "ids.device", "ids.ndim", 2);
        bind::expect(weights, "weights.device", "weights.ndim", 2);
        expect_dtype(x, "x.dtype", shim::dtype::kFloat32);
        expect_dtype(ids, "ids.dtype", shim::dtype::kInt64);
        expect_dtype(weights, "weights.dtype", shim::dtype::kFloat32);
        StepArgs args;
        args.layer = layer_;
        args.ids = matrix<const std::int64_t>(ids);
        args.weights = matrix<const float>(weights);
        if (scores) {
            bind::expect(*scores, "scores.device", "scores.ndim", 2);
            expect_dtype(*scores, "scores.dtype", shim::dtype::kFloat32);
            args.scores = matrix<const float>(*scores);
        }
        args.cpu = {&experts_, matrix<const float>(x), compute_, true, nullptr, nullptr};
        expect_rows(args.cpu.x, "x");
        raise(same("x.shape[1]", args.cpu.x.extent[1], "", experts_.hidden));
        raise(same("ids.shape[0]", args.ids.extent[0], "", args.cpu.x.extent[0]));
        Tensor out = shim::empty(2, x.shape(), shim::dtype::kFloat32);
        args.out = matrix<float>(out);
        raise(runtime_->step(device_->device_, args));
        return out;
    }

   private:
    static std::mutex& mutex() {
        static std::mutex one;
        return one;
    }
    static std::map<std::int64_t, Step*>& known() {
        static std::map<std::int64_t, Step*> all;
        return all;
    }

    Runtime* runtime_;
    Emulated* device_;
    std::int64_t layer_, number_ = 0;
    moe::Experts experts_;
    Array<std::uint8_t> packed_;
    gemm::Compute compute_;
};

void step(Boxed* stack, std::uint64_t, std::uint64_t) {
    const auto tensor = [stack](int i) { return Tensor(reinterpret_cast<shim::Handle>(stack[i])); };
    const Tensor x = tensor(0), ids = tensor(1), weights = tensor(2);
    const auto scores = shim::take_optional_tensor(stack[3]);
    stack[0] = Step::of(shim::unbox<std::int64_t>(stack[4]))(x, ids, weights, scores).release();
}

}  // namespace

void register_moe_step(py::module_& m) {
    py::class_<Step>(m, "Step", "A layer of a runtime, by whose number quernstone::moe_step goes.")
        .def(py::init<Runtime&, Emulated&, std::int64_t, const moe::Experts&,
                      const Array<std::uint8_t>&, const std::string&>(),
             py::arg("runtime"), py::arg("device"), py::arg("layer"), py::arg("layout"),
             py::arg("packed").noconvert(), py::arg("compute"), py::keep_alive<1, 2>(),
             py::keep_alive<1, 3>())
        .def_property_readonly("number", &Step::number);
}

void register_moe_step_operator() {
    shim::define(kSchema);
    shim::implement_cpu("moe_step", step);
}

}  // namespace quernstone::bind
