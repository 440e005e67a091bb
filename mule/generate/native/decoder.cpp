// The decoder's forward pass on a processor, for serving: fp32 arithmetic on fp32 or bf16 weights
// that stay where torch has them. The layers are those of mule/models/decoder.py, which says what
// they mean; the tests compare the two.
//
// A call takes any tokens of any conversations: the prompt of one in part, the next token of others.
// A token's result depends on its own conversation only, to the last bit: not on what else is in the
// call, on how a prompt was cut, or on the number of threads.

#include <omp.h>

#include <new>
#include <vector>

#include "attention.h"

namespace {

enum Matrix { QUERY, KEY, VALUE, OUT, GATE, UP, DOWN, MATRICES };
enum Norm { INPUT, AFTER_ATTENTION, BEFORE_MLP, AFTER_MLP, QUERY_NORM, KEY_NORM, NORMS };
enum Rope { NO_ROPE, FULL, LOCAL };
enum Table { SHORT, LONG, LOCAL_TABLE, TABLES };

struct Layer {
  const void* matrices[MATRICES];  // (outputs, inputs), fp32 or bf16
  const float* biases[MATRICES];   // or null
  const float* norms[NORMS];       // what the normalised is multiplied by, or null
  int64_t window;                  // tokens that are seen; 0: all
  int64_t rope;
};

struct Model {
  int64_t layers, hidden, heads, kv_heads, head_dim, inner, vocabulary;
  int64_t context, slots, turned;  // tokens of a slot's cache; channels of a head that turn
  int64_t is_bf16, is_gelu, threads;
  float norm_eps, attention_scale, residual_scale, embedding_scale, logit_scale, logit_softcap;
  const Layer* layer;
  const void *embedding, *head;
  const float* final_norm;
  void *keys, *values;        // (layers, slots, kv_heads, context, head_dim), like the weights
  const float* cos[TABLES];   // (context, turned / 2) or null
  const float* sin[TABLES];
};

struct Tokens {
  int64_t count;
  const int64_t *ids, *slots, *positions;  // those of a slot follow each other
  const uint8_t* is_long;                  // whose angles are those of a long text
  int64_t wanted_count;
  const int64_t* wanted;  // which tokens' logits are wanted
};

// Floats that begin where a cache line does.
class Room {
 public:
  explicit Room(long count) : vectors((count + LANES - 1) / LANES) {}
  float* data() { return (float*)vectors.data(); }
  const float* data() const { return (const float*)vectors.data(); }
  float& operator[](long i) { return data()[i]; }

 private:
  std::vector<Floats> vectors;
};

struct Work {  // queries of one tile, heads side by side
  long first_token, first_query, queries, kv_head;
};

template <class W>
class Forward {
 public:
  Forward(const Model& model, const Tokens& tokens, float* logits)
      : m(model), t(tokens), logits(logits), group(m.heads / m.kv_heads),
        query_size(m.heads * m.head_dim), kv_size(m.kv_heads * m.head_dim),
        x(t.count * m.hidden), h(t.count * std::max(m.hidden, query_size)),
        q(t.count * query_size), k(t.count * kv_size), v(t.count * kv_size),
        gate(t.count * m.inner), up(t.count * m.inner), added(t.count * m.hidden), own(0) {
    plan_attention();
    room_size = linear_room(t.count);
    own_size = room_size + TILE_ROWS * (longest + 2 * m.head_dim);
    own_size = (own_size + LANES - 1) / LANES * LANES;
    own = Room(m.threads * own_size);
  }

  void run() {
#pragma omp parallel num_threads(m.threads)
    {
      float* room = &own[omp_get_thread_num() * own_size];
      float *scores = room + room_size, *rows = scores + TILE_ROWS * longest;
      embed();
      for (long n = 0; n < m.layers; n++) {
        const Layer& layer = m.layer[n];
        norm(x.data(), h.data(), layer.norms[INPUT], t.count);
        project(layer, room);
        turn_and_keep(layer, n);
        attention(layer, n, scores, rows);
        add(layer, OUT, h.data(), query_size, AFTER_ATTENTION, room);
        const bool sandwich = layer.norms[BEFORE_MLP];
        norm(x.data(), h.data(), layer.norms[sandwich ? BEFORE_MLP : AFTER_ATTENTION], t.count);
        gated(layer, room);
        add(layer, DOWN, gate.data(), m.inner, AFTER_MLP, room);
      }
      head(room);
    }
  }

 private:
  const Model& m;
  const Tokens& t;
  float* logits;
  const long group, query_size, kv_size;
  Room x, h, q, k, v, gate, up, added;
  Room own;  // of each thread: for `linear`, scores, rows of queries
  long room_size, own_size;
  std::vector<Work> work;
  long longest = 0;

  // Tokens of one slot that follow each other are cut into tiles of queries, for each head.
  void plan_attention() {
    long tile = TILE_ROWS;
    for (;; tile /= 2) {
      work.clear();
      for (long first = 0, next; first < t.count; first = next) {
        for (next = first + 1; next < t.count && t.slots[next] == t.slots[first]; next++) {}
        longest = std::max<long>(longest, t.positions[next - 1] + 1);
        const long queries = (next - first) * group;
        for (long kv_head = 0; kv_head < m.kv_heads; kv_head++)
          for (long query = 0; query < queries; query += tile)
            work.push_back({first, query, std::min(tile, queries - query), kv_head});
      }
      if ((long)work.size() >= m.threads || tile == 1) break;
    }
    longest = (longest + LANES - 1) / LANES * LANES;
  }

  void embed() {
#pragma omp for schedule(static)
    for (long n = 0; n < t.count; n++) {
      const W* row = (const W*)m.embedding + t.ids[n] * m.hidden;
      for (long i = 0; i < m.hidden; i++)
        x[n * m.hidden + i] = widened(row[i]) * m.embedding_scale;
    }
  }

  void norm_row(const float* from, float* to, const float* weight, long size) const {
    Floats squares{};
    long i = 0;
    for (; i + LANES <= size; i += LANES) squares += load(from + i) * load(from + i);
    float sum = sum_lanes(squares);
    for (; i < size; i++) sum += from[i] * from[i];
    const float factor = 1.0f / std::sqrt(sum / size + m.norm_eps);
    for (i = 0; i < size; i++) to[i] = from[i] * factor * weight[i];
  }

  void norm(const float* from, float* to, const float* weight, long rows) const {
#pragma omp for schedule(static)
    for (long n = 0; n < rows; n++)
      norm_row(from + n * m.hidden, to + n * m.hidden, weight, m.hidden);
  }

  // How many outputs a thread takes at once.
  long block(long outputs) const {
    const long even = outputs / (4 * m.threads);
    return std::max(BLOCK, even / BLOCK * BLOCK);
  }

  template <class Put>
  void outputs(const Layer& layer, Matrix matrix, const float* from, long size, long begin,
               long end, float* room, Put put) const {
    const W* weights = (const W*)layer.matrices[matrix];
    if (const float* bias = layer.biases[matrix])
      linear(from, size, t.count, weights, size, begin, end, room,
             [&](long row, long n, float value) { put(row, n, value + bias[n]); });
    else
      linear(from, size, t.count, weights, size, begin, end, room, put);
  }

  void project(const Layer& layer, float* room) {
    const long step = block(query_size + 2 * kv_size);
    const long query_blocks = (query_size + step - 1) / step, kv_blocks = (kv_size + step - 1) / step;
    const auto part = [&](Matrix matrix, Room& to, long size, long index) {
      outputs(layer, matrix, h.data(), m.hidden, index * step, std::min((index + 1) * step, size),
              room, [&](long row, long n, float value) { to[row * size + n] = value; });
    };
#pragma omp for schedule(dynamic)
    for (long index = 0; index < query_blocks + 2 * kv_blocks; index++) {
      if (index < query_blocks)
        part(QUERY, q, query_size, index);
      else if (index < query_blocks + kv_blocks)
        part(KEY, k, kv_size, index - query_blocks);
      else
        part(VALUE, v, kv_size, index - query_blocks - kv_blocks);
    }
  }

  // Normalises and turns a head's channels.
  void turn(const Layer& layer, const float* weight, long token, float* head) const {
    if (weight) norm_row(head, head, weight, m.head_dim);
    if (layer.rope == NO_ROPE) return;
    const Table table = layer.rope == LOCAL ? LOCAL_TABLE : t.is_long[token] ? LONG : SHORT;
    const long half = m.turned / 2;
    const float* cos = m.cos[table] + t.positions[token] * half;
    const float* sin = m.sin[table] + t.positions[token] * half;
    for (long i = 0; i < half; i++) {
      const float a = head[i], b = head[i + half];
      head[i] = a * cos[i] - b * sin[i];
      head[i + half] = b * cos[i] + a * sin[i];
    }
  }

  long cache_place(long layer, long slot, long kv_head) const {
    return ((layer * m.slots + slot) * m.kv_heads + kv_head) * m.context * m.head_dim;
  }

  void turn_and_keep(const Layer& layer, long n) {
    const long size = m.head_dim;
#pragma omp for schedule(static)
    for (long token = 0; token < t.count; token++) {
      for (long head = 0; head < m.heads; head++)
        turn(layer, layer.norms[QUERY_NORM], token, &q[token * query_size + head * size]);
      for (long head = 0; head < m.kv_heads; head++) {
        float* key = &k[token * kv_size + head * size];
        const float* value = &v[token * kv_size + head * size];
        turn(layer, layer.norms[KEY_NORM], token, key);
        const long place = cache_place(n, t.slots[token], head) + t.positions[token] * size;
        for (long i = 0; i < size; i++) {
          narrow(key[i], ((W*)m.keys)[place + i]);
          narrow(value[i], ((W*)m.values)[place + i]);
        }
      }
    }
  }

  // h (tokens, query_size) becomes what the heads saw.
  void attention(const Layer& layer, long n, float* scores, float* rows) {
    const long size = m.head_dim;
#pragma omp for schedule(dynamic)
    for (long index = 0; index < (long)work.size(); index++) {
      const Work& w = work[index];
      QueryTile tile{w.queries, {}, {}};
      const auto place = [&](long i) {  // of query i in q and in h
        const long query = w.first_query + i, token = w.first_token + query / group;
        return token * query_size + (w.kv_head * group + query % group) * size;
      };
      for (long i = 0; i < w.queries; i++) {
        const long position = t.positions[w.first_token + (w.first_query + i) / group];
        tile.last[i] = position;
        tile.first[i] = layer.window ? std::max<long>(0, position + 1 - layer.window) : 0;
        for (long d = 0; d < size; d++) rows[i * size + d] = q[place(i) + d] * m.attention_scale;
      }
      const long cache = cache_place(n, t.slots[w.first_token], w.kv_head);
      float* out = rows + TILE_ROWS * size;
      attend(tile, rows, (const W*)m.keys + cache, (const W*)m.values + cache, size, scores, longest,
             out);
      for (long i = 0; i < w.queries; i++) std::copy_n(out + i * size, size, &h[place(i)]);
    }
  }

  void add_scaled(float& to, float value) const {
    to = multiply_add(m.residual_scale, value, to);
  }

  // x += what a half of the layer adds, normalised before where the model does that.
  void add(const Layer& layer, Matrix matrix, const float* from, long size, Norm after,
           float* room) {
    const bool sandwich = layer.norms[BEFORE_MLP];
    const long step = block(m.hidden);
#pragma omp for schedule(dynamic)
    for (long index = 0; index < (m.hidden + step - 1) / step; index++) {
      const long begin = index * step, end = std::min(begin + step, (long)m.hidden);
      outputs(layer, matrix, from, size, begin, end, room, [&](long row, long n, float value) {
        if (sandwich)
          added[row * m.hidden + n] = value;
        else
          add_scaled(x[row * m.hidden + n], value);
      });
    }
    if (!sandwich) return;
#pragma omp for schedule(static)
    for (long n = 0; n < t.count; n++) {
      float* row = &added[n * m.hidden];
      norm_row(row, row, layer.norms[after], m.hidden);
      for (long i = 0; i < m.hidden; i++) add_scaled(x[n * m.hidden + i], row[i]);
    }
  }

  void gated(const Layer& layer, float* room) {
    const long step = block(m.inner);
    const Floats one = spread(1.0f);
    const auto put_in = [&](Room& to) {
      return [&](long row, long n, float value) { to[row * m.inner + n] = value; };
    };
#pragma omp for schedule(dynamic)
    for (long index = 0; index < (m.inner + step - 1) / step; index++) {
      const long begin = index * step, end = std::min(begin + step, (long)m.inner);
      outputs(layer, GATE, h.data(), m.hidden, begin, end, room, put_in(gate));
      outputs(layer, UP, h.data(), m.hidden, begin, end, room, put_in(up));
      for (long n = 0; n < t.count; n++) {
        float* g = &gate[n * m.inner + begin];
        const float* u = &up[n * m.inner + begin];
        if (m.is_gelu)  // g / 2 (1 + tanh(z)) = g / (1 + e^-2z)
          each(g, u, end - begin, [&](Floats a, Floats b) {
            const Floats z = 0.7978845608f * (a + 0.044715f * a * a * a);
            return a / (one + exponential(-2.0f * z)) * b;
          });
        else
          each(g, u, end - begin, [&](Floats a, Floats b) {
            return a / (one + exponential(-a)) * b;
          });
      }
    }
  }

  void head(float* room) {
#pragma omp for schedule(static)
    for (long n = 0; n < t.wanted_count; n++) {
      norm_row(&x[t.wanted[n] * m.hidden], &h[n * m.hidden], m.final_norm, m.hidden);
      for (long i = 0; i < m.hidden; i++) h[n * m.hidden + i] *= m.logit_scale;
    }
    if (t.wanted_count == 0) return;
    const long step = block(m.vocabulary);
    const float cap = m.logit_softcap;
#pragma omp for schedule(dynamic)
    for (long index = 0; index < (m.vocabulary + step - 1) / step; index++) {
      const long begin = index * step, end = std::min(begin + step, (long)m.vocabulary);
      linear(h.data(), m.hidden, t.wanted_count, (const W*)m.head, m.hidden, begin, end, room,
             [&](long row, long n, float value) {
               logits[row * m.vocabulary + n] = cap > 0 ? std::tanh(value / cap) * cap : value;
             });
    }
  }
};

}  // namespace

// Logits (wanted_count, vocabulary) of the wanted tokens; 0, or 1 when memory is short.
extern "C" int mule_forward(const Model* model, const Tokens* tokens, float* logits) {
  try {
    if (model->is_bf16)
      Forward<Bf16>(*model, *tokens, logits).run();
    else
      Forward<float>(*model, *tokens, logits).run();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

extern "C" int64_t mule_sizes(int64_t which) {  // that Python lays the structures out alike
  return which == 0 ? sizeof(Layer) : which == 1 ? sizeof(Model) : sizeof(Tokens);
}
