// One call of a kernel in a process on another machine: takes memory from a file, every range at the address that it has
// where it comes from, calls, and puts what the memory holds then into the file.
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <tuple>
#include <vector>

struct Array {
  int64_t of[4];
};

extern "C" {
void calidrop_decode(void*);
void calidrop_columns(Array, Array, int32_t, void*, void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, int32_t,
                      float, float, int32_t, int32_t, void*, int32_t);
void calidrop_prompt(Array, Array, Array, int32_t, void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, int32_t,
                     int32_t, float, float, void*, void*, void*, int32_t);
void calidrop_alike(void*, int64_t, int64_t, int32_t, float, int32_t, void*, int32_t);
void calidrop_network(void*, int64_t, void*, void*, void*, void*, void*, void*, int64_t, int64_t, int32_t, void*, int32_t);
void calidrop_weights(void*, void*, void*, int64_t, int64_t, int64_t, int64_t, int32_t, int32_t, void*, int32_t);
void calidrop_remember(void*, void*, void*, void*, void*, int64_t, int64_t, int32_t, int32_t, int32_t, float, int32_t, float,
                       float, void*, int32_t, void*, void*, void*, void*, void*, void*, void*, void*, int32_t);
void calidrop_follow(void*, int64_t, int64_t, int64_t, void*, void*, int64_t, int64_t, void*, void*, int32_t, double, void*,
                     void*, void*, void*, void*, float, void*, void*, void*, int32_t);
void calidrop_exchange(void*, int64_t, int64_t, int64_t, void*, void*, int64_t, int64_t, void*, void*, int64_t, void*, int64_t,
                       void*, int32_t);
void calidrop_linear(void*, void*, int32_t, void*, int32_t, int32_t, int32_t, void*, int32_t);
void calidrop_latents(void*, void*);
}

struct Range {
  char* at;
  size_t size;
};

static void need(bool fine, const char* what) {
  if (fine) return;
  std::perror(what);
  std::exit(1);
}

// arguments, eight bytes each (an Array four times as many): integers, pointers, doubles
struct Words {
  const int64_t* next;
  template <class T> T take() {
    T x;
    if constexpr (std::is_same_v<T, float>) {
      double y;
      std::memcpy(&y, next, 8);
      x = static_cast<float>(y);
    } else {
      std::memcpy(&x, next, sizeof(T));  // both machines are little endian
    }
    next += (sizeof(T) + 7) / 8;
    return x;
  }
};

template <class... A> void call(void (*f)(A...), Words w) {
  std::apply(f, std::tuple<A...>{w.take<A>()...});  // in braces: from left to right
}

int main(int, char** names) {
  std::FILE* file = std::fopen(names[1], "r+b");
  need(file, names[1]);
  int64_t sizes[3];  // ranges, words, which function
  need(std::fread(sizes, 8, 3, file) == 3, "sizes");
  std::vector<Range> ranges(sizes[0]);
  std::vector<int64_t> words(sizes[1]);
  need(std::fread(ranges.data(), sizeof(Range), ranges.size(), file) == ranges.size(), "ranges");
  need(std::fread(words.data(), 8, words.size(), file) == words.size(), "words");
  const long memory = std::ftell(file);
  constexpr uintptr_t PAGE = 1 << 12;
  std::set<uintptr_t> there;  // ranges may share a page
  for (const Range& x : ranges) {
    for (auto at = reinterpret_cast<uintptr_t>(x.at) / PAGE * PAGE; at < reinterpret_cast<uintptr_t>(x.at) + x.size; at += PAGE) {
      if (!there.insert(at).second) continue;
      void* p = reinterpret_cast<void*>(at);
      need(mmap(p, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == p, "mmap");
    }
    need(std::fread(x.at, 1, x.size, file) == x.size, "memory");
  }
  const Words w{words.data()};
  switch (sizes[2]) {
    case 0: call(calidrop_decode, w); break;
    case 1: call(calidrop_columns, w); break;
    case 2: call(calidrop_prompt, w); break;
    case 3: call(calidrop_alike, w); break;
    case 4: call(calidrop_network, w); break;
    case 5: call(calidrop_weights, w); break;
    case 6: call(calidrop_remember, w); break;
    case 7: call(calidrop_follow, w); break;
    case 8: call(calidrop_exchange, w); break;
    case 9: call(calidrop_linear, w); break;
    case 10: call(calidrop_latents, w); break;
  }
  std::fseek(file, memory, SEEK_SET);
  for (const Range& x : ranges) need(std::fwrite(x.at, 1, x.size, file) == x.size, "result");
  return std::fclose(file);
}
