// What training computes in C++ on a processor: attention by document, and the loss.

#include "attention.h"
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
