// read_index on any bytes, and what it took read through and verified. An input is the size of the .bin as eight bytes,
// all 0xFF for the size that fits, and the .idx.
#include "xlm_ds/index_format.hpp"

#include <limits>
#include <span>
#include <string>
#include <vector>

#include "fuzz.hpp"
#include "index_twin.hpp"

namespace {

using namespace xlm_ds_fuzz;

constexpr auto kFitting = std::numeric_limits<std::uint64_t>::max();

std::string input_of(std::uint64_t data_bytes, const std::string& index) {
  std::string bytes;
  put(bytes, data_bytes);
  return bytes + index;
}

void compare(const xlm_ds::Index& index, std::span<const std::byte> bytes, const IndexTwin& twin) {
  require(index.kind == twin.kind && index.id_bias() == (twin.lazy() ? 1 : 0), "the layout is told");
  require(static_cast<std::uint64_t>(index.dtype) == twin.dtype, "the element type is told");
  require(index.sequences == twin.lengths.size(), "the sequences are counted");
  require(index.tokens == *twin.data_bytes() / twin.width, "the tokens are counted");
  for (std::uint64_t i = 0; i < index.sequences; ++i) {
    require(xlm_ds::sequence_length(index, bytes, i) == static_cast<std::uint64_t>(twin.lengths[i]), "lengths are those stored");
    const auto start = twin.start(i);
    require(!start || xlm_ds::sequence_start(index, bytes, i) == *start, "starts are those stored");
  }
  require(index.documents == (twin.documents.empty() ? 0 : twin.documents.size() - 1), "the documents are counted");
  for (std::uint64_t i = 0; i < twin.documents.size(); ++i) {
    require(xlm_ds::document_start(index, bytes, i) == twin.documents[i], "documents are those stored");
  }
  const bool verified = accepts([&] { xlm_ds::verify_index(index, bytes, "x.idx"); });
  require(verified == twin.whole(), "what is verified are sequences that follow one another to the .bin's end");
}

}  // namespace

std::vector<std::string> xlm_ds_fuzz::seeds() {
  return {input_of(16, mmap_index(8, {4, 3, 1})),
          input_of(kFitting, mmap_index(9, {1, 1, 1, 250})),
          input_of(kFitting, mmap_index(1, {1, 2, 3})),
          input_of(kFitting, mmap_index(1, {-1, 1, 3})),  // starts that follow by overflow
          input_of(0, mmap_index(8, {})),
          input_of(32, lazy_index(4, {4, 3, 1})),
          input_of(kFitting, lazy_index(5, {1, 0, 7})),
          input_of(0, lazy_index(4, {})),
          input_of(kFitting, megatron_index(8, {4, 3, 1}, {0, 2, 3})),
          input_of(kFitting, megatron_index(4, {4, 3, 1}, {0, 3}) + "\1\1\1"),
          input_of(0, megatron_index(8, {}, {0}))};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  constexpr std::size_t kSizeBytes = 8;
  if (size < kSizeBytes) return 0;
  const std::string_view input = text_of(data, size);
  const std::string_view idx = input.substr(kSizeBytes);
  const auto twin = parse_index(idx);
  const auto fitting = twin ? twin->data_bytes() : std::nullopt;
  auto data_bytes = number_at<std::uint64_t>(input, 0);
  if (data_bytes == kFitting) data_bytes = fitting.value_or(0);
  // In memory of just this size, so that reading on is noticed.
  const std::vector<std::byte> exact(reinterpret_cast<const std::byte*>(idx.data()),
                                     reinterpret_cast<const std::byte*>(idx.data() + idx.size()));
  const bool accepted = accepts([&] { compare(xlm_ds::read_index(exact, data_bytes, "x.idx"), exact, *twin); });
  require(accepted == (fitting == data_bytes), "an .idx is taken if it fits itself and its .bin");
  count(accepted);
  return 0;
}
