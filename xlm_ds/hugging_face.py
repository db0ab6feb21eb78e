"""Models of Hugging Face's transformers: read, written, and computed by the library itself.

    network, logits = open_hugging_face(Path("xlm-mlm-xnli15-1024"), None, ())
    write_hugging_face(network, Path("hf"))       # config.json, model.safetensors, the tokenizer's files

XLM's own network is XLMWithLMHeadModel; one with a norm on its embeddings and a transform before the output matrix is
BertForMaskedLM, whose token types are our languages. Read are also RoBERTa and XLM-RoBERTa, whose network is the
latter with other names. The library is needed only to write and to compute: pip install 'xlm_ds[hf]'.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from xlm_ds.architectures import ModelShape
from xlm_ds.dictionary import EOS, GOES_ON, MASK, PAD, SPECIAL_SYMBOLS, UNK, Dictionary
from xlm_ds.exchange import (
    HF_BERT,
    NO_HINTS,
    XLM,
    XLM_NAMES_OF_SPECIALS,
    Hints,
    Logits,
    Names,
    Network,
    State,
    activation_of,
    languages_of,
    left_over,
    matrix_of,
    names_by_id,
    network_from,
    refuse_unknown,
    share_of,
    sizes_of,
    state_of,
    whole_number_of,
    with_rows,
)
from xlm_ds.files import load_json_object
from xlm_ds.log import InputError
from xlm_ds.pair_record import load_companions
from xlm_ds.text_ids import TextToIds
from xlm_ds.tokenisation import Tokenisation
from xlm_ds.torch_model import opened_torch_model

HF_ROBERTA = HF_BERT._replace(first_position_row=2)
OWN = "xlm_ds"  # of config.json: what else there is to know of a network of ours
WORD_END = "</w>"
SAMPLE_WORDS = 1000  # of the texts that tokenizers are compared on

_BERT_SPECIALS = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")
_XLM_UNNEEDED = re.compile(r"<special[0-9]>")
_ROBERTAS = ("roberta", "xlm-roberta", "camembert")

_XLM_PREFIX = "transformer."
_ROBERTA_PARTS = {
    "roberta.": "bert.",
    "lm_head.dense.": "cls.predictions.transform.dense.",
    "lm_head.layer_norm.": "cls.predictions.transform.LayerNorm.",
    "lm_head.decoder.": "cls.predictions.decoder.",
    "lm_head.bias": "cls.predictions.bias",
}
# Of models that came from TensorFlow.
_REPAIRS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_REPAIRED = re.compile("|".join(_REPAIRS).replace(".", r"\."))
# Of the sentence loss, and tables of 0, 1, 2, … that older versions have kept.
_UNUSED = ("bert.pooler.", "cls.seq_relationship.", "bert.embeddings.position_ids", "position_ids")


# ------------------------------------------------------------------------------------------- read


def open_hugging_face(folder: Path, hints: Hints = NO_HINTS) -> tuple[Network, Logits]:
    """Raises InputError, OSError."""
    where = str(folder)
    config = load_json_object(folder / "config.json")
    kind = config.get("model_type")
    if kind not in ("xlm", "bert", *_ROBERTAS):
        raise InputError(f"{folder}: is of type {kind}; there is xlm, bert, {', '.join(_ROBERTAS)}")
    is_xlm = kind == "xlm"
    names = XLM if is_xlm else HF_BERT if kind == "bert" else HF_ROBERTA
    state = {_plain_name(name): value for name, value in _read_state(folder).items()}
    own = config.get(OWN)
    if config.get("quantization_config") is not None:
        raise InputError(
            f"{folder}: is quantized, which no network here is; give it as it was before"
        )
    segments = state.pop(f"{names.languages}.weight", None)
    known = own["languages"] if own else names_by_id(config.get("lang2id"), where)
    known = languages_of(known, hints, where, has_rows=is_xlm and segments is not None)
    if own and segments is not None:
        segments = segments[: own["num_segment"]]
    elif not is_xlm and segments is not None:
        # Its rows are a text and a second one; all texts here are the first, in any language.
        segments = segments[:1].expand(len(known) if bool(segments[0].any()) else 0, -1)
    if segments is not None and len(segments):
        state[f"{names.languages}.weight"] = segments

    table = matrix_of(state, f"{names.tokens}.weight", where)
    found, rows = _vocabulary(folder, own is not None, kind, len(table))
    state = with_rows(state, rows, names)
    shape = (_xlm_shape if is_xlm else _bert_shape)(config, state, names, where)
    unknown = left_over(state, shape, names)
    if not hints.parts:
        refuse_unknown([name for name in unknown if not name.startswith(_UNUSED)], where)
    remarks = [f"left out: {', '.join(unknown)}"] if unknown else []
    if len(rows) < len(table):
        remarks.append(f"left out: {len(table) - len(rows)} rows of its table that no word has")
    if not (own or is_xlm):
        begin = _BERT_SPECIALS[2] if kind == "bert" else SPECIAL_SYMBOLS[EOS]
        remarks.append(
            f"its texts begin with another word than here, where they begin with {begin}; a text is its first segment, "
            "in every language"
        )
    network = network_from(state, shape, names, found, known, where, remarks, parts=hints.parts)
    companions = load_companions(folder) if own else {}
    if is_xlm and "codes" not in companions and (folder / "merges.txt").exists():
        companions["codes"] = _codes(folder / "merges.txt")
    network = dataclasses.replace(network, companions=companions)
    asks_languages = shape.num_segment > 0 and (is_xlm or own is not None)
    argument = ("langs" if is_xlm else "token_type_ids") if asks_languages else None
    return network, _logits(folder, rows, argument)


def _read_state(folder: Path) -> dict[str, Tensor]:
    """From safetensors, or else from the pickle that older models have, by a reader that runs nothing in it."""
    state: dict[str, Tensor] = {}
    for name in _weight_files(folder):
        try:
            if name.endswith(".bin"):
                with opened_torch_model(folder / name) as saved:
                    state |= load_file(saved.tensors)
            else:
                state |= load_file(folder / name)
        except SafetensorError as error:
            raise InputError(f"{folder / name}: is damaged: {error}") from error
    return {_REPAIRED.sub(lambda found: _REPAIRS[found[0]], name): t for name, t in state.items()}


def _weight_files(folder: Path) -> list[str]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [name]
        index = folder / f"{name}.index.json"
        if index.exists():  # in parts
            return sorted({str(part) for part in load_json_object(index)["weight_map"].values()})
    raise InputError(f"{folder}: has neither model.safetensors nor pytorch_model.bin")


def _plain_name(name: str) -> str:
    """XLM's names without their prefix, and RoBERTa's as BERT's."""
    for theirs, bert in _ROBERTA_PARTS.items():
        if name.startswith(theirs):
            return bert + name.removeprefix(theirs)
    if name.startswith(
        ("embeddings.word_", "embeddings.pos", "embeddings.tok", "embeddings.L", "encoder.layer.")
    ):
        return f"bert.{name}"  # of a network that was saved without a head
    return name.removeprefix(_XLM_PREFIX)


def _codes(merges: Path) -> bytes:
    """As fastBPE has them, whose third column nothing reads."""
    pairs = (line.split() for line in merges.read_text(encoding="utf-8").splitlines())
    return "".join(f"{pair[0]} {pair[1]} 1\n" for pair in pairs if len(pair) >= 2).encode()


def _xlm_shape(config: Mapping[str, Any], state: State, names: Names, where: str) -> ModelShape:
    for flag, what in (("asm", "an adaptive softmax"), ("causal", "a mask of what comes after")):
        if config.get(flag):
            raise InputError(f"{where}: has {what} ({flag}), which no network here has")
    return ModelShape(
        **_sizes(state, names, where),
        attention_heads=whole_number_of(config, "n_heads", where),
        dropout=share_of(config, "dropout"),
        attention_dropout=share_of(config, "attention_dropout"),
        activation_dropout=share_of(config.get(OWN) or {}, "activation_dropout"),
        activation_fn="gelu" if config.get("gelu_activation", True) else "relu",
        first_position_row=0,
        layer_norm_eps=float(config.get("layer_norm_eps", 1e-12)),
        head_transform=False,
        initialisation="xlm",
    )


def _bert_shape(config: Mapping[str, Any], state: State, names: Names, where: str) -> ModelShape:
    kind = config.get("position_embedding_type", "absolute")
    if kind != "absolute" or config.get("is_decoder"):
        raise InputError(f"{where}: has {kind} positions, or is a decoder; no network here does so")
    return ModelShape(
        **_sizes(state, names, where),
        attention_heads=whole_number_of(config, "num_attention_heads", where),
        dropout=share_of(config, "hidden_dropout_prob"),
        attention_dropout=share_of(config, "attention_probs_dropout_prob"),
        activation_dropout=share_of(config.get(OWN) or {}, "activation_dropout"),
        activation_fn=activation_of(config.get("hidden_act", "gelu"), where),
        layer_norm_eps=float(config.get("layer_norm_eps", 1e-12)),
    )


def _sizes(state: State, names: Names, where: str) -> dict[str, Any]:
    positions = matrix_of(state, f"{names.positions}.weight", where)
    return {
        **sizes_of(state, names, where),
        "max_positions": len(positions) - names.first_position_row,
        "token_positions": True,
        "normalize_embeddings": True,
    }


def _vocabulary(
    folder: Path, is_own: bool, kind: str, table_rows: int
) -> tuple[Dictionary, Sequence[int]]:
    """The dictionary, and of each of its rows which it is of the peer's table."""
    if is_own and (folder / "dict.txt").exists():
        found = Dictionary.load(folder / "dict.txt")
        if len(found) != table_rows:
            raise InputError(
                f"{folder / 'dict.txt'}: has {len(found)} rows with the special symbols, and the model has {table_rows}"
            )
        return found, range(table_rows)
    words = _words(folder)
    theirs = {"xlm": XLM_NAMES_OF_SPECIALS, "bert": _BERT_SPECIALS}
    specials = SPECIAL_SYMBOLS if is_own else theirs.get(kind, SPECIAL_SYMBOLS)
    marks_ends = kind == "xlm" or any(word.endswith(WORD_END) for word in words.values())
    place = {word: number for number, word in words.items() if number < table_rows}
    missing = [word for word in specials if word not in place]
    if missing:
        raise InputError(
            f"{folder}: its vocabulary has no {missing[0]}, which a model of its kind needs"
        )
    symbols, rows = list(SPECIAL_SYMBOLS), [place[word] for word in specials]
    taken = {*specials, *SPECIAL_SYMBOLS}
    for number in sorted(words):
        word = words[number]
        is_special = word in taken or (kind == "xlm" and _XLM_UNNEEDED.fullmatch(word) is not None)
        if number < table_rows and not is_special:
            symbols.append(_as_piece(word) if marks_ends else word)
            rows.append(number)
    return Dictionary(tuple(symbols), (1,) * len(symbols)), rows


def _words(folder: Path) -> dict[int, str]:
    """By id: of vocab.json, tokenizer.json or vocab.txt."""
    if (folder / "vocab.json").exists():
        by_word = load_json_object(folder / "vocab.json")
    elif (folder / "tokenizer.json").exists():
        content = load_json_object(folder / "tokenizer.json")
        by_word = content.get("model", {}).get("vocab", {})
        if isinstance(by_word, list):  # of Unigram: pairs of a piece and its score
            by_word = {piece[0]: number for number, piece in enumerate(by_word)}
        for added in content.get("added_tokens", ()):
            by_word[added["content"]] = added["id"]
    elif (folder / "vocab.txt").exists():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        by_word = {word: number for number, word in enumerate(lines) if word}
    else:
        raise InputError(
            f"{folder}: has neither vocab.json nor tokenizer.json nor vocab.txt; save it with its tokenizer"
        )
    return {number: word for word, number in by_word.items() if type(number) is int}


def _as_piece(word: str) -> str:
    """XLM's tokenizer marks where a word ends, fastBPE where it goes on."""
    return word.removesuffix(WORD_END) if word.endswith(WORD_END) else word + GOES_ON


# ------------------------------------------------------------------------------------- the library


@contextlib.contextmanager
def _library() -> Iterator[Any]:
    """The library, without what it says of itself. Raises InputError if it is not there."""
    try:
        library: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise InputError(
            f"{error.name}, which writes and runs models of Hugging Face, is not installed; pip install 'xlm_ds[hf]'"
        ) from error
    say = library.utils.logging
    verbosity = say.get_verbosity()
    say.set_verbosity_error()
    say.disable_progress_bar()
    try:
        yield library
    finally:
        say.set_verbosity(verbosity)


def _logits(folder: Path, rows: Sequence[int], argument: str | None) -> Logits:
    """`rows`: of our dictionary's, which they are there. `argument`: what it calls the languages."""
    load = functools.cache(_load)
    place = torch.tensor(rows)

    @torch.no_grad()
    def logits(ids: Tensor, languages: Tensor) -> Tensor:
        more = {} if argument is None else {argument: languages[:, None].expand_as(ids)}
        found: Tensor = load(folder)(
            input_ids=place[ids], attention_mask=ids.ne(PAD).long(), **more
        ).logits
        return found[..., place]

    return logits


def _load(folder: Path) -> Any:
    with _library() as library:
        if _weight_files(folder)[0].endswith(".bin"):  # a pickle, which no library is to read
            config = library.AutoConfig.from_pretrained(folder, local_files_only=True)
            model = library.AutoModelForMaskedLM.from_config(
                config, attn_implementation="eager", dtype=torch.float32
            )
            model.load_state_dict(_read_state(folder), strict=False)  # _read_state's are complete
            model.tie_weights()
        else:
            model = library.AutoModelForMaskedLM.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                attn_implementation="eager",  # config.json could name one to be downloaded, and run
                dtype=torch.float32,
            )
    return model.double().eval()


# ------------------------------------------------------------------------------------------ write


def write_hugging_face(network: Network, folder: Path) -> list[str]:
    """Makes `folder` with config.json, model.safetensors, the tokenizer's files and ours; returns what there is to say.

    Raises InputError for a network that the library has no class for.
    """
    check_has_class(network.shape)
    folder.mkdir()
    shape, weights = network.shape, network.weights
    is_xlm = not shape.head_transform
    names = XLM if is_xlm else HF_BERT
    state = state_of(weights, shape, names)
    missing_rows = languages_there(shape) - shape.num_segment
    if missing_rows:  # its class has a table where we have none, or one of two rows at least
        table = weights.get("language_embedding.weight", torch.zeros(0, shape.embed_dim))
        more = torch.zeros(missing_rows, shape.embed_dim)
        state[f"{names.languages}.weight"] = torch.cat([table, more])
    with _library() as library:
        if is_xlm:
            config = library.XLMConfig(**_xlm_config(shape))
            model = library.XLMWithLMHeadModel(config)
            state = {_name_of_xlm(name): value for name, value in state.items()}
        else:
            config = library.BertConfig(**_bert_config(shape))
            model = library.BertForMaskedLM(config)
        config.lang2id = {language: number for number, language in enumerate(network.languages)}
        config.id2lang = {str(number): language for language, number in config.lang2id.items()}
        known = {
            "languages": list(network.languages),
            "num_segment": shape.num_segment,
            "activation_dropout": shape.activation_dropout,
        }
        setattr(config, OWN, known)
        lost = set(state) - set(model.state_dict())
        assert not lost, f"transformers {library.__version__} has no {lost}"
        model.load_state_dict(state, strict=False)  # without the copies, which it ties
        model.tie_weights()
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:  # a full disk, above all
            raise OSError(f"cannot write {folder}: {error}") from error
        for path in folder.glob("*.safetensors"):  # safetensors makes them their owner's alone
            path.chmod(folder.stat().st_mode & 0o666)
        network.save_text_files(folder)
        said = [
            _how_languages_are_told(network, is_xlm),
            *_write_tokenizer(network, folder, library),
        ]
    if shape.token_positions and bool(unread_positions(network).any()):
        said.append("left out: rows of its position table that nothing reads")
    return said


def _how_languages_are_told(network: Network, is_xlm: bool) -> str:
    if network.shape.num_segment == 0:
        return "it has no table of languages"
    argument = "langs" if is_xlm else "token_type_ids"
    without = "no language" if is_xlm else f"all text as {network.languages[0]}"
    return f"it is told the language of each id by {argument}=, by config.lang2id; without, it takes {without}"


def unread_positions(network: Network) -> Tensor:
    """Rows of the position table before the first position."""
    table = network.weights["position_embedding.weight"]
    return table[: network.shape.first_position_row]


def check_has_class(shape: ModelShape) -> None:
    """Raises InputError, with what to train instead, if the library has no class for such a network."""
    instead = "train with --encoder-normalize-before for BertForMaskedLM, or with --arch xlm for XLMWithLMHeadModel"
    if not shape.normalize_embeddings:
        raise InputError(
            "Hugging Face has no class for a network without a norm on its embeddings, as xlm_base is by default; "
            + instead
        )
    if not shape.token_positions:
        raise InputError("Hugging Face has no class for a network without positions; " + instead)
    if not shape.head_transform and shape.ffn_embed_dim != 4 * shape.embed_dim:
        raise InputError(
            f"Hugging Face's XLM has feed-forward parts of four times its width, {4 * shape.embed_dim}, and this has "
            f"{shape.ffn_embed_dim}; train with --encoder-ffn-embed-dim {4 * shape.embed_dim}"
        )


def languages_there(shape: ModelShape) -> int:
    """Rows of the table of languages, or of token types, that its class has for such a network."""
    if shape.head_transform:
        return max(shape.num_segment, 1)
    return max(shape.num_segment, 2) if shape.num_segment else 0


def _name_of_xlm(name: str) -> str:
    return name if name.startswith("pred_layer.") else _XLM_PREFIX + name


def _xlm_config(shape: ModelShape) -> dict[str, Any]:
    rows = languages_there(shape)
    return {
        "vocab_size": shape.vocab_size,
        "emb_dim": shape.embed_dim,
        "n_layers": shape.layers,
        "n_heads": shape.attention_heads,
        "dropout": shape.dropout,
        "attention_dropout": shape.attention_dropout,
        "gelu_activation": shape.activation_fn == "gelu",
        "n_langs": max(rows, 1),
        "use_lang_emb": rows > 0,
        "max_position_embeddings": shape.max_positions,
        "layer_norm_eps": shape.layer_norm_eps,
        "bos_token_id": EOS,  # which rows begin with
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "unk_index": UNK,
        "mask_index": MASK,
        "mask_token_id": MASK,
    }


def _bert_config(shape: ModelShape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.embed_dim,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.attention_heads,
        "intermediate_size": shape.ffn_embed_dim,
        "hidden_act": shape.activation_fn,
        "hidden_dropout_prob": shape.dropout,
        "attention_probs_dropout_prob": shape.attention_dropout,
        "max_position_embeddings": shape.max_positions,
        "type_vocab_size": languages_there(shape),
        "layer_norm_eps": shape.layer_norm_eps,
        "bos_token_id": EOS,  # which rows begin with
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "cls_token_id": EOS,
        "sep_token_id": EOS,
        "mask_token_id": MASK,
    }


# -------------------------------------------------------------------------------------- tokenizer


def _write_tokenizer(network: Network, folder: Path, library: Any) -> list[str]:
    """XLM's tokenizer where the model has codes, else one that looks pieces up; returns what there is to say."""
    if "codes" not in network.companions:
        _lookup(network, library).save_pretrained(folder)
        return [
            "its tokenizer takes text that is tokenised and split already: the model has no codes"
        ]
    to_ids = TextToIds.load(folder, network.dictionary)
    settings = to_ids.tokenisation
    tokenizer = _xlm_tokenizer(network, settings, folder, library)
    tokenizer.save_pretrained(folder)
    bypass = settings is None or settings.tokenizer == "none"
    texts = sample_texts(network)
    plain = told = 0
    for text, language in texts:
        wanted = to_ids(text, language).tolist()
        plain += tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == wanted
        # transformers 5.23.0 hands neither to _tokenize when it is called as it should be.
        pieces = tokenizer._tokenize(text, lang=language, bypass_tokenizer=bypass)
        told += tokenizer.convert_tokens_to_ids(pieces) == wanted
    how = "bypass_tokenizer=True) on tokenised text" if bypass else "lang=…)"
    said = [
        f"its tokenizer takes every text for English: of {len(texts)} texts tried it gives {plain} the ids that they "
        f"have here, and {told} with tokenizer._tokenize(text, {how}"
    ]
    if settings is not None and settings.lowercase != settings.remove_accents:
        said.append("it leaves case and accents as they are, as it can only change both")
    return said


def sample_texts(network: Network) -> list[tuple[str, str]]:
    """Texts of the dictionary's most frequent whole words and some punctuation, each in one of the languages."""
    words = [s for s in network.dictionary.symbols if s.isalpha()][:SAMPLE_WORDS]
    texts = [" ".join(words[at : at + 7]) for at in range(0, len(words), 7)]
    return [
        # What Moses treats by language: quotes, apostrophes, hyphens, abbreviations, numbers.
        (
            f"{text[:1].upper()}{text[1:]}, “{text[-3:]}” l'{text} {text[:2]}. No. {number}-{number}, 3.5% "
            f"({text[:4]}'s)!",
            language,
        )
        for number, text in enumerate(texts)
        for language in [network.languages[number % len(network.languages)]]
    ]


def _xlm_tokenizer(
    network: Network, settings: Tokenisation | None, folder: Path, library: Any
) -> Any:
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    by_word: dict[str, int] = {}
    for number, symbol in enumerate(network.dictionary.symbols):
        by_word.setdefault(_as_word(symbol) if number >= len(SPECIAL_SYMBOLS) else symbol, number)
    vocabulary.write_text(json.dumps(by_word, ensure_ascii=False), encoding="utf-8")
    merges.write_bytes(network.companions["codes"].rstrip(b"\n") + b"\n")
    numbers = {language: number for number, language in enumerate(network.languages)}
    changes = settings is not None and settings.lowercase and settings.remove_accents
    return library.XLMTokenizer(
        vocab_file=str(vocabulary),
        merges_file=str(merges),
        bos_token=SPECIAL_SYMBOLS[EOS],  # what a row begins with, here as in XLM
        mask_token=SPECIAL_SYMBOLS[MASK],
        additional_special_tokens=[],
        lang2id=numbers,
        id2lang={str(number): language for language, number in numbers.items()},
        do_lowercase_and_remove_accent=changes,
        model_max_length=network.shape.max_positions,
    )


def _as_word(piece: str) -> str:
    return piece.removesuffix(GOES_ON) if piece.endswith(GOES_ON) else piece + WORD_END


def _lookup(network: Network, library: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    _, pad, eos, unk, mask = SPECIAL_SYMBOLS
    by_word = {symbol: number for number, symbol in enumerate(network.dictionary.symbols)}
    tokenizer = Tokenizer(models.WordLevel(by_word, unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{eos} $A {eos}", pair=f"{eos} $A {eos} $B {eos}", special_tokens=[(eos, EOS)]
    )
    return library.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=eos, pad_token=pad, eos_token=eos, sep_token=eos, cls_token=eos,
        unk_token=unk, mask_token=mask, model_max_length=network.shape.max_positions,
    )  # fmt: skip
