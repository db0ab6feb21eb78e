// The border between Python and the core, and the only file that includes pybind11: a table of contents.
// Every entry names its arguments, releases the interpreter's lock, calls the core, and returns. Policy is Python's.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "xlm_ds/binarize.hpp"
#include "xlm_ds/bpe.hpp"
#include "xlm_ds/dictionary.hpp"
#include "xlm_ds/error.hpp"
#include "xlm_ds/fill_batch.hpp"
#include "xlm_ds/mask.hpp"
#include "xlm_ds/order.hpp"
#include "xlm_ds/progress.hpp"
#include "xlm_ds/shards.hpp"
#include "xlm_ds/special_ids.hpp"
#include "xlm_ds/stream.hpp"
#include "xlm_ds/token_dataset.hpp"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

using Unlock = py::call_guard<py::gil_scoped_release>;
using Int64Array = py::array_t<std::int64_t, py::array::c_style>;
using UInt64Array = py::array_t<std::uint64_t, py::array::c_style>;

std::span<std::int64_t> writable(Int64Array& array) {
  return {array.mutable_data(), static_cast<std::size_t>(array.size())};
}
std::span<const std::int64_t> readable(const Int64Array& array) {
  return {array.data(), static_cast<std::size_t>(array.size())};
}
template <typename T>
py::array_t<T> as_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

/// std::system_error carries an errno: as OSError(errno, message) Python makes FileNotFoundError and its kin of it.
void translate_system_error(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const std::system_error& e) {
    const py::object exception = py::reinterpret_borrow<py::object>(PyExc_OSError)(e.code().value(), e.what());
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(exception.ptr())), exception.ptr());
  }
}

void register_special_ids(py::module_& m) {
  m.attr("BOS") = xlm_ds::kBos;
  m.attr("PAD") = xlm_ds::kPad;
  m.attr("EOS") = xlm_ds::kEos;
  m.attr("UNK") = xlm_ds::kUnk;
  m.attr("MASK") = xlm_ds::kMask;
  m.attr("SPECIALS") = xlm_ds::kSpecials;
}

void register_bpe(py::module_& m) {
  py::class_<xlm_ds::Bpe>(m, "Bpe")
      .def(py::init<const std::filesystem::path&, const std::optional<std::filesystem::path>&>(), "codes_path"_a,
           "vocab_path"_a = py::none(), Unlock())
      .def("apply_line", [](const xlm_ds::Bpe& bpe, const py::bytes& line) { return py::bytes(bpe.apply(line)); }, "line"_a)
      .def("apply_file", &xlm_ds::Bpe::apply_file, "input_path"_a, "output_path"_a, "threads"_a = 1, Unlock());
  m.def("count_words", &xlm_ds::count_words, "paths"_a, "output_path"_a, "threads"_a = 1, Unlock());
}

void register_binarize(py::module_& m) {
  using xlm_ds::TextCounts;
  py::class_<xlm_ds::Dictionary>(m, "Dictionary")
      .def(py::init<std::vector<std::string>>(), "symbols"_a)
      .def("__len__", &xlm_ds::Dictionary::size);
  py::enum_<xlm_ds::IndexKind>(m, "IndexKind")
      .value("mmap", xlm_ds::IndexKind::mmap)
      .value("lazy", xlm_ds::IndexKind::lazy)
      .value("megatron", xlm_ds::IndexKind::megatron);
  py::class_<xlm_ds::Progress>(m, "Progress")
      .def(py::init<>())
      .def_property_readonly("done_bytes", &xlm_ds::Progress::done_bytes)
      .def("cancel", &xlm_ds::Progress::cancel);
  py::class_<TextCounts>(m, "TextCounts")
      .def_readonly("lines", &TextCounts::lines)
      .def_readonly("tokens", &TextCounts::tokens)
      .def_readonly("unknown", &TextCounts::unknown)
      .def_readonly("blank_lines", &TextCounts::blank_lines)
      .def_readonly("literal_specials", &TextCounts::literal_specials)
      .def_property_readonly("by_id", [](const TextCounts& counts) { return as_array(counts.by_id); });
  py::class_<xlm_ds::Piece>(m, "Piece")
      .def(py::init<std::filesystem::path, std::uint64_t, std::uint64_t>(), "path"_a, "begin"_a = 0,
           "end"_a = xlm_ds::Piece::kToTheEnd);
  m.attr("STANDARD_INPUT") = xlm_ds::kStandardInput;
  m.def("encode_text",
        [](const std::vector<xlm_ds::Piece>& text, const xlm_ds::Dictionary& dictionary,
           xlm_ds::IndexKind kind, const std::filesystem::path& data_path,
           const std::filesystem::path& lengths_path, std::size_t threads,
           xlm_ds::Progress& progress, std::size_t chunk_bytes, const xlm_ds::Bpe* bpe) {
          return xlm_ds::encode_text(text, dictionary, kind, {data_path, lengths_path}, threads,
                                     progress, chunk_bytes, bpe);
        },
        "text"_a, "dictionary"_a, "kind"_a, "data_path"_a, "lengths_path"_a, "threads"_a,
        "progress"_a, "chunk_bytes"_a = xlm_ds::kBinarizeChunkBytes, "bpe"_a = py::none(), Unlock());
  m.def("write_text_index", &xlm_ds::write_text_index, "index_path"_a, "kind"_a,
        "dictionary_size"_a, "lengths_path"_a, Unlock());
  m.def("count_text_words",
        [](const std::vector<xlm_ds::Piece>& text, std::size_t threads, xlm_ds::Progress& progress,
           std::size_t chunk_bytes, const xlm_ds::Bpe* bpe) {
          return xlm_ds::count_text_words(text, threads, progress, chunk_bytes, bpe);
        },
        "text"_a, "threads"_a, "progress"_a, "chunk_bytes"_a = xlm_ds::kBinarizeChunkBytes,
        "bpe"_a = py::none(), Unlock());
}

void register_datasets(py::module_& m) {
  using xlm_ds::TokenDataset;
  py::enum_<xlm_ds::BreakMode>(m, "BreakMode")
      .value("none", xlm_ds::BreakMode::none)
      .value("eos", xlm_ds::BreakMode::eos)
      .value("complete", xlm_ds::BreakMode::complete)
      .value("complete_doc", xlm_ds::BreakMode::complete_doc);
  py::class_<TokenDataset>(m, "TokenDataset")
      .def(py::init<const std::filesystem::path&, xlm_ds::BreakMode, std::uint64_t>(), "prefix"_a,
           py::kw_only(), "mode"_a, "block_size"_a, Unlock())
      .def_property_readonly("sequences", &TokenDataset::sequences)
      .def_property_readonly("tokens", &TokenDataset::tokens)
      .def_property_readonly("blocks", &TokenDataset::blocks)
      .def_property_readonly("block_size", &TokenDataset::block_size)
      .def_property_readonly("table_bytes", &TokenDataset::table_bytes)
      .def("block_length", &TokenDataset::block_length, "block"_a, Unlock())
      .def("count_cut", &TokenDataset::count_cut, Unlock())
      .def("fill_block",
           [](const TokenDataset& dataset, std::uint64_t block, std::int64_t vocab_size,
              Int64Array out) {
             const auto ids = writable(out);
             const py::gil_scoped_release unlocked;
             return dataset.fill_block(block, vocab_size, ids);
           },
           "block"_a, py::kw_only(), "vocab_size"_a, "out"_a.noconvert());
  py::class_<xlm_ds::Stream>(m, "Stream")
      .def(py::init<const TokenDataset&, std::int64_t>(), "blocks"_a, "language"_a,
           py::keep_alive<1, 2>())
      .def(py::init<const TokenDataset&, std::int64_t, const TokenDataset&, std::int64_t>(),
           "first"_a, "language"_a, "second"_a, "second_language"_a, py::keep_alive<1, 2>(),
           py::keep_alive<1, 4>())
      .def_property_readonly("blocks", &xlm_ds::Stream::blocks)
      .def_property_readonly("block_size", &xlm_ds::Stream::block_size)
      .def("count_cut", &xlm_ds::Stream::count_cut, Unlock());
}

void register_shards(py::module_& m) {
  using xlm_ds::Dtype;
  using xlm_ds::Pair;
  using xlm_ds::PairWriter;
  auto dtypes = py::enum_<Dtype>(m, "Dtype");
  for (const Dtype dtype : {Dtype::uint8, Dtype::int8, Dtype::int16, Dtype::int32, Dtype::int64,
                            Dtype::uint16, Dtype::uint32, Dtype::uint64}) {
    dtypes.value(std::string(xlm_ds::dtype_name(dtype)).c_str(), dtype);
  }
  m.def("dtype_to_write", &xlm_ds::dtype_to_write, "kind"_a, "dictionary_size"_a);
  py::class_<Pair>(m, "Pair")
      .def(py::init<const std::filesystem::path&>(), "prefix"_a, Unlock())
      .def_property_readonly("kind", [](const Pair& pair) { return pair.index().kind; })
      .def_property_readonly("dtype", [](const Pair& pair) { return pair.index().dtype; })
      .def_property_readonly("lines", [](const Pair& pair) { return pair.index().sequences; })
      .def_property_readonly("tokens", [](const Pair& pair) { return pair.index().tokens; })
      .def_property_readonly("documents", [](const Pair& pair) { return pair.index().documents; })
      .def("tokens_before", &Pair::tokens_before, "line"_a, Unlock())
      .def("lines_within", &Pair::lines_within, "tokens"_a, Unlock())
      .def("line", [](const Pair& pair, std::uint64_t number) { return as_array(pair.line(number)); }, "number"_a)
      .def("count_lengths", &Pair::count_lengths, Unlock())
      .def("count_ids",
           [](const Pair& pair, std::uint64_t vocab_size, xlm_ds::Progress& progress) {
             std::vector<std::uint64_t> counts;
             {
               const py::gil_scoped_release unlocked;
               counts = pair.count_ids(vocab_size, progress);
             }
             return as_array(counts);
           },
           "vocab_size"_a, "progress"_a);
  m.def("verify_pair", &xlm_ds::verify_pair, "pair"_a, "vocab_size"_a, "progress"_a, Unlock());
  py::class_<PairWriter>(m, "PairWriter")
      .def(py::init<const std::filesystem::path&, std::filesystem::path, xlm_ds::IndexKind, Dtype,
                    std::uint64_t>(),
           "data_path"_a, "lengths_path"_a, "kind"_a, "dtype"_a, "vocab_size"_a, Unlock())
      .def("append", &PairWriter::append, "pair"_a, "first"_a, "end"_a, "progress"_a, Unlock())
      .def("append_ids",
           [](PairWriter& writer, const Int64Array& ids, const Int64Array& lengths) {
             const auto from = readable(ids);
             const auto of = readable(lengths);
             const py::gil_scoped_release unlocked;
             writer.append_ids(from, of);
           },
           "ids"_a.noconvert(), "lengths"_a.noconvert())
      .def("finish", &PairWriter::finish, "index_path"_a, Unlock());
}

void register_order(py::module_& m) {
  using Segment = std::pair<std::uint64_t, std::vector<std::uint64_t>>;
  py::class_<xlm_ds::Permutation>(m, "Permutation")
      .def(py::init<std::uint64_t, std::uint64_t>(), py::kw_only(), "key"_a, "size"_a)
      .def("__call__", &xlm_ds::Permutation::operator(), "index"_a);
  py::class_<xlm_ds::Order>(m, "Order")
      .def(py::init([](std::uint64_t seed, std::vector<Segment> segments,
                       const std::vector<std::uint64_t>& blocks) {
             std::vector<xlm_ds::Segment> parts;
             for (auto& [first, weights] : segments) parts.push_back({first, std::move(weights)});
             return xlm_ds::Order(seed, parts, blocks);
           }),
           py::kw_only(), "seed"_a, "segments"_a, "blocks"_a)
      .def("fill_samples",
           [](const xlm_ds::Order& order, std::uint64_t first, Int64Array streams,
              Int64Array passes, Int64Array blocks) {
             const xlm_ds::SampleColumns out{writable(streams), writable(passes),
                                             writable(blocks)};
             const py::gil_scoped_release unlocked;
             order.fill_samples(first, out);
           },
           "first"_a, py::kw_only(), "streams"_a.noconvert(), "passes"_a.noconvert(),
           "blocks"_a.noconvert());
}

void register_batches(py::module_& m) {
  using Streams = std::vector<const xlm_ds::Stream*>;
  m.def("masked_count", &xlm_ds::masked_count, "mask_ratio"_a, "tokens"_a);
  m.def(
      "fill_batch",
      [](const Streams& streams, const Int64Array& numbers, const Int64Array& passes,
         const Int64Array& blocks, std::uint64_t seed, double mask_ratio, std::int64_t vocab_size,
         Int64Array input_ids, Int64Array languages, Int64Array second_languages,
         Int64Array second_starts, Int64Array masked_positions, Int64Array targets,
         const std::optional<UInt64Array>& word_goes_on) {
        const xlm_ds::Rows rows{streams, readable(numbers), readable(passes), readable(blocks)};
        const xlm_ds::BatchArrays out{writable(input_ids),        writable(languages),
                                      writable(second_languages), writable(second_starts),
                                      writable(masked_positions), writable(targets)};
        xlm_ds::Masking masking{.seed = seed, .ratio = mask_ratio, .vocab_size = vocab_size};
        if (word_goes_on) {
          masking.word_goes_on = {word_goes_on->data(),
                                  static_cast<std::size_t>(word_goes_on->size())};
        }
        const py::gil_scoped_release unlocked;
        const auto [has_padding, has_pairs] = xlm_ds::fill_batch(rows, masking, out);
        return std::pair(has_padding, has_pairs);
      },
      "streams"_a, py::kw_only(), "numbers"_a.noconvert(), "passes"_a.noconvert(),
      "blocks"_a.noconvert(), "seed"_a, "mask_ratio"_a, "vocab_size"_a,
      "input_ids"_a.noconvert(), "languages"_a.noconvert(), "second_languages"_a.noconvert(),
      "second_starts"_a.noconvert(), "masked_positions"_a.noconvert(), "targets"_a.noconvert(),
      "word_goes_on"_a.noconvert() = py::none());
  m.def(
      "count_targets",
      [](const Streams& streams, const Int64Array& numbers, const Int64Array& passes,
         const Int64Array& blocks, double mask_ratio) {
        const xlm_ds::Rows rows{streams, readable(numbers), readable(passes), readable(blocks)};
        const py::gil_scoped_release unlocked;
        return xlm_ds::count_targets(rows, mask_ratio);
      },
      "streams"_a, py::kw_only(), "numbers"_a.noconvert(), "passes"_a.noconvert(),
      "blocks"_a.noconvert(), "mask_ratio"_a);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "the C++ core of xlm_ds; its contract is _core.pyi";
  py::register_exception<xlm_ds::InputError>(m, "InputError", PyExc_ValueError);
  py::register_exception_translator(&translate_system_error);

  register_special_ids(m);
  register_bpe(m);
  register_binarize(m);
  register_datasets(m);
  register_shards(m);
  register_order(m);
  register_batches(m);
}
