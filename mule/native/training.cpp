// What training computes in C++ on a processor: attention by document, experts, state spaces and the
// loss.

#include "attention.h"
#include "convolution.h"
#include "decay.h"
#include "experts.h"
#include "softmax.h"

extern "C" int64_t mule_attention_room(const attention::Job* job) {
  return attention::room_bytes(*job);
}
extern "C" void mule_attention(const attention::Job* job) { attention::run(*job, true); }
extern "C" void mule_attention_backward(const attention::Job* job) { attention::run(*job, false); }

// Rows (rows, size) of logits, side by side, become the gradient of their loss times `factor`; nll
// (rows): -log p of each target, 0 where it is negative. A softcap of 0 is none.
extern "C" void mule_softmax_nll(void* logits, int64_t is_bf16, int64_t rows, int64_t size,
                                 const int64_t* targets, float factor, float softcap, float* nll,
                                 int64_t threads) {
  if (is_bf16)
    loss::run((Bf16*)logits, rows, size, targets, factor, softcap, nll, threads);
  else
    loss::run((float*)logits, rows, size, targets, factor, softcap, nll, threads);
}

// ---------------------------------------------------------------- experts (experts.h)

extern "C" void mule_swiglu(const int64_t* order, int64_t rows, int64_t is_bf16, const void* inner,
                            const void* weights, int64_t size, void* hidden, int64_t threads) {
  const experts::Tokens tokens = {order, rows, threads};
  if (is_bf16)
    experts::swiglu(tokens, (const Bf16*)inner, (const Bf16*)weights, size, (Bf16*)hidden);
  else
    experts::swiglu(tokens, (const float*)inner, (const float*)weights, size, (float*)hidden);
}

template <class In>
static void swiglu_backward(const experts::Tokens& tokens, const void* inner, const void* weights,
                            int64_t size, void* grads, void* grad_inner, void* grad_weights) {
  experts::swiglu_backward(tokens, (const In*)inner, (const In*)weights, size, (In*)grads,
                           (In*)grad_inner, (In*)grad_weights);
}

extern "C" void mule_swiglu_backward(const int64_t* order, int64_t rows, int64_t is_bf16,
                                     const void* inner, const void* weights, int64_t size,
                                     void* grads, void* grad_inner, void* grad_weights,
                                     int64_t threads) {
  (is_bf16 ? swiglu_backward<Bf16> : swiglu_backward<float>)(
      {order, rows, threads}, inner, weights, size, grads, grad_inner, grad_weights);
}

extern "C" void mule_sum_by_token(const int64_t* order, int64_t rows, int64_t is_bf16,
                                  const void* values, int64_t num_tokens, int64_t top_k,
                                  int64_t size, int64_t* places, void* y, int64_t threads) {
  const experts::Tokens tokens = {order, rows, threads};
  experts::find_places(tokens, num_tokens * top_k, places);
  if (is_bf16)
    experts::sum_by_token((const Bf16*)values, places, num_tokens, top_k, size, (Bf16*)y, threads);
  else
    experts::sum_by_token((const float*)values, places, num_tokens, top_k, size, (float*)y,
                          threads);
}

#if defined(__AVX512BF16__)
extern "C" int64_t mule_experts_room(int64_t rows, int64_t num_experts, int64_t a, int64_t b,
                                     int64_t threads) {
  return experts::room_words(rows, num_experts, a, b, threads);
}

extern "C" void mule_multiply_experts(const Bf16* rows, const Bf16* matrices, const int64_t* ends,
                                      int64_t num_experts, int64_t a, int64_t b,
                                      int64_t is_transposed, Pair* room, Bf16* out,
                                      int64_t threads) {
  experts::multiply(rows, matrices, ends, num_experts, a, b, is_transposed, room, out, threads);
}

extern "C" void mule_multiply_experts_transposed(const Bf16* left, const Bf16* right,
                                                 const int64_t* ends, int64_t num_experts,
                                                 int64_t a, int64_t b, Pair* room, Bf16* out,
                                                 int64_t threads) {
  experts::multiply_transposed(left, right, ends, num_experts, a, b, room, out, threads);
}
#endif

// ---------------------------------------------------------------- state spaces

extern "C" int64_t mule_convolution_room(const convolution::Job* job) {
  return convolution::room_floats(*job);
}
extern "C" void mule_convolution(const convolution::Job* job) {
  (job->is_bf16 ? convolution::run<Bf16> : convolution::run<float>)(*job, true);
}
extern "C" void mule_convolution_backward(const convolution::Job* job) {
  (job->is_bf16 ? convolution::run<Bf16> : convolution::run<float>)(*job, false);
}

extern "C" int64_t mule_decay_room(const decay::Job* job) { return decay::room_floats(*job); }
extern "C" void mule_decay(const decay::Job* job) {
  (job->is_bf16 ? decay::run<Bf16> : decay::run<float>)(*job, true);
}
extern "C" void mule_decay_backward(const decay::Job* job) {
  (job->is_bf16 ? decay::run<Bf16> : decay::run<float>)(*job, false);
}
