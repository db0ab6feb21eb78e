// The least that any program must do that turns text into words: read the file and find where words and lines end.
// Usage: scan FILE...; prints the numbers of newlines and of blanks.

#include <fcntl.h>
#include <immintrin.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

constexpr std::size_t kChunk = std::size_t{1} << 18;
constexpr std::size_t kBlock = 64;

struct Masks {
  std::uint64_t newlines, blanks;
};

#if defined(__AVX512BW__)
Masks masks_of(const char* at) {
  const __m512i bytes = _mm512_loadu_si512(at);
  return {_mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8('\n')), _mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8(' '))};
}
#elif defined(__AVX2__)
std::uint64_t equal(__m256i low, __m256i high, char wanted) {
  const __m256i all = _mm256_set1_epi8(wanted);
  const auto bits = [&](__m256i bytes) {
    return static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, all)));
  };
  return bits(low) | std::uint64_t{bits(high)} << 32;
}
Masks masks_of(const char* at) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32));
  return {equal(low, high, '\n'), equal(low, high, ' ')};
}
#else
#error "scan.cpp knows AVX2 and AVX-512 only"
#endif

}  // namespace

int main(int count, char** paths) {
  std::vector<char> chunk(kChunk + kBlock);
  std::vector<std::uint32_t> ends(kChunk);
  std::uint64_t newlines = 0, blanks = 0, checksum = 0;
  for (int i = 1; i < count; ++i) {
    const int file = open(paths[i], O_RDONLY);
    if (file < 0) return std::perror(paths[i]), 1;
    for (ssize_t size; (size = read(file, chunk.data(), kChunk)) > 0;) {
      for (std::size_t pad = 0; pad < kBlock; ++pad) chunk[static_cast<std::size_t>(size) + pad] = 'x';
      std::size_t found = 0;
      for (std::size_t at = 0; at < static_cast<std::size_t>(size); at += kBlock) {
        const Masks masks = masks_of(chunk.data() + at);
        newlines += static_cast<std::uint64_t>(__builtin_popcountll(masks.newlines));
        blanks += static_cast<std::uint64_t>(__builtin_popcountll(masks.blanks));
        for (std::uint64_t rest = masks.newlines | masks.blanks; rest != 0; rest &= rest - 1)
          ends[found++] = static_cast<std::uint32_t>(at) + static_cast<std::uint32_t>(__builtin_ctzll(rest));
      }
      checksum += found == 0 ? 0 : ends[found / 2];  // or the positions would not have to be found
    }
    close(file);
  }
  std::printf("%llu newlines, %llu blanks (%llu)\n", static_cast<unsigned long long>(newlines),
              static_cast<unsigned long long>(blanks), static_cast<unsigned long long>(checksum));
  return 0;
}
