// A CUDA device that is none, for a torch built without CUDA. Its memory is main memory, every operation runs on the CPU.
//
// What a real one insists on, this one insists on as well: tensors of two devices do not meet in one operation, memory ends at
// a limit, and while syncs are forbidden, whatever makes the host wait (reading a value, copies that are not asynchronous,
// results whose size only the device knows) raises. In shapes-only mode nothing is computed: operations make tensors of the
// right shapes without numbers in them, so that what large networks take of memory can be found out.
//
// Works on torch's internals (2.13) and may need changes with another torch. See __init__.py.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Copy.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorIterator.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace {

using c10::IntArrayRef;
using c10::IValue;
using torch::jit::Stack;

const c10::Device DEVICE(c10::DeviceType::CUDA, 0);
const bool shapes_only = std::getenv("PRETEND_GPU_SHAPES_ONLY") != nullptr;
std::atomic<bool> forbid_waiting{false};
thread_local bool inside = false;  // an operation is being computed: what it copies is not traffic of the device

struct Inside {
  bool before = inside;
  Inside() { inside = true; }
  ~Inside() { inside = before; }
};

void waits(const std::string& what) {
  TORCH_CHECK(inside || !forbid_waiting, "called a synchronizing CUDA operation (pretended GPU): ", what);
}

// --------------------------------------------------------------------------------------------------------------------
// Memory

constexpr long HEADER = 64;
std::atomic<long> used{0}, peak{0}, limit{1L << 62};

void give_back(void* pointer) {
  char* block = static_cast<char*>(pointer) - HEADER;
  used -= *reinterpret_cast<long*>(block);
  std::free(block);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &give_back, DEVICE};
    const long size = (static_cast<long>(bytes) + 511) / 512 * 512;
    if (used + size > limit) throw c10::OutOfMemoryError({__func__, __FILE__, __LINE__}, "CUDA out of memory (pretended GPU)");
    void* block = nullptr;
    TORCH_CHECK(posix_memalign(&block, HEADER, bytes + HEADER) == 0, "no main memory for the pretended GPU");
    *static_cast<long*>(block) = size;
    const long now = (used += size);
    for (long before = peak; now > before && !peak.compare_exchange_weak(before, now);) {}
    void* pointer = static_cast<char*>(block) + HEADER;
    return {pointer, pointer, &give_back, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
} memory;

struct Pinned final : c10::Allocator {  // plain main memory
  c10::DataPtr allocate(size_t bytes) override { return c10::GetCPUAllocator()->allocate(bytes); }
  c10::DeleterFnPtr raw_deleter() const override { return c10::GetCPUAllocator()->raw_deleter(); }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
} pinned;

// --------------------------------------------------------------------------------------------------------------------
// What torch asks of a device

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct CUDAHooks final : at::CUDAHooksInterface {  // torch looks for this name
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};
using at::CUDAHooksArgs;
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

// --------------------------------------------------------------------------------------------------------------------
// Making, viewing and copying tensors

at::Tensor on_cpu(const at::Tensor& t) {  // the same memory, seen as a tensor of the CPU
  if (!t.is_cuda()) return t;
  auto options = t.options().device(at::kCPU);
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), [keep = t](void*) {}, options, at::kCPU);
}

at::Tensor empty(IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
                 std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

const at::Tensor& resized(const at::Tensor& t, IntArrayRef size, std::optional<at::MemoryFormat> format) {
  if (t.sizes() == size && !format) return t;
  const size_t need = at::detail::computeStorageNbytesContiguous(size, t.dtype().itemsize(), t.storage_offset());
  if (t.storage().nbytes() < need) {
    auto place = memory.allocate(need);
    if (t.storage().nbytes()) std::memcpy(place.get(), t.storage().data(), t.storage().nbytes());
    t.storage().set_data_ptr_noswap(std::move(place));
    t.storage().set_nbytes(need);
  }
  t.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  if (format && *format != at::MemoryFormat::Preserve) t.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return t;
}

at::Tensor& set_part(at::Tensor& t, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  if (stride.empty()) {
    t.unsafeGetTensorImpl()->set_storage_offset(offset.expect_int());
    t.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  } else {
    t.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  }
  return t;
}

at::Tensor& set_whole(at::Tensor& t, at::Storage storage) {
  const int64_t count = storage.nbytes() / t.dtype().itemsize();
  return set_part(t, std::move(storage), 0, {c10::SymInt(count)}, {});
}

at::Tensor& set_as(at::Tensor& t, const at::Tensor& other) {
  return set_part(t, other.storage(), other.sym_storage_offset(), other.sym_sizes(), other.sym_strides());
}

at::Tensor view(const at::Tensor& t, c10::SymIntArrayRef size) { return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size)); }

at::Tensor as_strided(const at::Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  const auto place = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), place);
}

at::Tensor reshape_alias(const at::Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Scalar item(const at::Tensor& t) {
  waits("reading a value");
  if (shapes_only) std::memset(t.data_ptr(), 0, t.dtype().itemsize());
  return at::native::_local_scalar_dense_cpu(on_cpu(t));
}

void copy_values(at::TensorIterator& pair, bool non_blocking) {  // what Tensor.copy_ ends in where a GPU takes part
  const auto to = pair.tensor(0), from = pair.tensor(1);
  if (to.device() != from.device() && !non_blocking) waits(to.is_cuda() ? "a copy to the device" : "a copy to the host");
  if (shapes_only) return;
  at::NoGradGuard no_grad;
  at::AutoDispatchBelowADInplaceOrView below;
  on_cpu(to).copy_(on_cpu(from));
}

at::Tensor copy_result(const at::Tensor& from, const at::Tensor& to) {  // how the CPU's results come back
  Inside now;
  if (to.sizes() != from.sizes()) to.is_cuda() ? resized(to, from.sizes(), std::nullopt) : to.resize_(from.sizes());
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

at::Tensor copy_result_async(const at::Tensor& from, const at::Tensor& to, bool) { return copy_result(from, to); }

int64_t kind_of_attention(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
                          std::optional<double>, bool) {
  return static_cast<int64_t>(shapes_only ? at::SDPBackend::flash_attention : at::SDPBackend::math);
}

struct Kernels {
  Kernels() {
    c10::SetAllocator(c10::DeviceType::CUDA, &memory, 1);
    at::native::copy_stub.set_cuda_dispatch_ptr(&copy_values);
    at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&kind_of_attention);
  }
} kernels;

// --------------------------------------------------------------------------------------------------------------------
// Every other operation

template <class Map>
IValue mapped(const IValue& value, const Map& map) {  // `map` applied to the tensors in it
  if (value.isTensor()) return map(value.toTensor());
  if (value.isTensorList()) {
    std::vector<at::Tensor> found;
    for (const auto& t : value.toTensorVector()) found.push_back(map(t));
    return found;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> found;
    for (const auto& t : value.toOptionalTensorVector()) found.push_back(t ? std::optional<at::Tensor>(map(*t)) : t);
    return found;
  }
  if (value.isDevice()) return c10::Device(c10::DeviceType::Meta);
  return value;
}

void shapes_of(const c10::OperatorHandle& op, Stack* stack, size_t count) {
  std::vector<std::pair<at::Tensor, at::Tensor>> known;  // a tensor here, and what stands for it on the meta device
  const auto there = [&](const at::Tensor& t) {
    if (!t.defined() || !t.is_cuda()) return t;
    for (const auto& [ours, theirs] : known)
      if (ours.is_same(t)) return theirs;
    known.emplace_back(t, at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kMeta)));
    return known.back().second;
  };
  const auto back = [&](const at::Tensor& t) {
    if (!t.defined() || !t.is_meta()) return t;
    for (const auto& [ours, theirs] : known)
      if (theirs.is_same(t)) return ours.sizes() == t.sizes() ? ours : resized(ours, t.sizes(), std::nullopt);
    known.emplace_back(at::empty_strided(t.sizes(), t.strides(), t.options().device(DEVICE)), t);
    return known.back().first;
  };
  Stack inner;
  for (const auto& value : torch::jit::last(*stack, count)) inner.push_back(mapped(value, there));
  torch::jit::drop(*stack, count);
  op.callBoxed(inner);
  for (const auto& value : inner) stack->push_back(mapped(value, back));
}

void compute(const c10::OperatorHandle& op, Stack* stack) {
  const auto& name = op.schema().name();
  for (auto* unknown_size : {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::equal",
                             "aten::is_nonzero", "aten::bincount", "aten::unique_consecutive"})
    if (name == unknown_size) waits(name);
  if (name == "aten::repeat_interleave" && op.schema().overload_name() == "Tensor") waits(name);
  const size_t count = op.schema().arguments().size();
  for (const auto& value : torch::jit::last(*stack, count)) {
    const bool indices = value.isOptionalTensorList();  // of x[indices]: they may lie on the host, which waits for them
    mapped(value, [&](const at::Tensor& t) {
      if (!t.defined() || t.is_cuda() || t.dim() == 0 || inside) return t;
      TORCH_CHECK(indices, "Expected all tensors to be on the same device, but found cuda:0 and cpu (pretended GPU: ", name, ")");
      waits("an index on the host");
      return t;
    });
  }
  if (shapes_only) return shapes_of(op, stack, count);
  Inside now;
  at::native::cpu_fallback(op, stack, false, c10::DispatchKey::CPU);
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("unfold", at::native::unfold);
  library.impl("resize_", resized);
  library.impl("set_.source_Storage_storage_offset", set_part);
  library.impl("set_.source_Storage", set_whole);
  library.impl("set_.source_Tensor", set_as);
  library.impl("_local_scalar_dense", item);
  library.impl("_copy_from_and_resize", copy_result);
  library.impl("_copy_from", copy_result_async);
  // torch would make these of others that are slow on the CPU
  for (auto* name : {"convolution", "convolution_backward", "native_group_norm", "native_group_norm_backward"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&compute>());
}

TORCH_LIBRARY_IMPL(aten, CPU, library) {
  library.impl("_copy_from_and_resize", copy_result);
  library.impl("_copy_from", copy_result_async);
}

}  // namespace

extern "C" {
void pretend_forbid_waiting(int on) { forbid_waiting = on != 0; }
void pretend_limit(long bytes) { limit = bytes; }
void pretend_forget_peak() { peak = used.load(); }
long pretend_used() { return used; }
long pretend_peak() { return peak; }
}
