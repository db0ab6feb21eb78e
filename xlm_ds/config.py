"""Every knob, on one page. Flags, TOML keys and --help are generated from these frozen dataclasses (flags.py).

The names are those of fairseq's recipe; there is no second set to translate.

    config = parse(TrainConfig, ["OUT", "--lr", "1e-4", "--monolingual-langs", "ar,de"])
    config.optimization.lr  # 0.0001
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xlm_ds.devices import GPUS
from xlm_ds.flags import knob, knob_like
from xlm_ds.log import InputError
from xlm_ds.steps import Steps

# --------------------------------------------------------------------------------------- prepare


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareConfig:
    """Raw text to tokenised and BPE'd splits, codes and vocabulary."""

    langs: tuple[str, ...] = knob("languages, as ar,de,en")
    destdir: Path = knob("folder for {train,valid,test}.LANG, codes, vocab_mlm and prepare.json")
    input: str | None = knob(
        "raw text to be split, one file per language: raw/{lang}.txt, or a prefix P for P.LANG",
        default=None,
    )
    wiki_dump: str | None = knob(
        "instead of --input: Wikipedia's dumps, as {lang}wiki-latest-pages-articles.xml.bz2; needs xlm_ds[wiki]",
        default=None,
    )
    trainpref: str | None = knob("raw text that is split already: PREF.LANG", default=None)
    validpref: str | None = knob("raw validation text is PREF.LANG", default=None)
    testpref: str | None = knob("raw test text is PREF.LANG", default=None)
    parallel: str | None = knob(
        "text whose line i translates line i of another file: para/{split} for para/train.en-fr.en and "
        "para/train.en-fr.fr, and valid and test where they are; all lines stay, whatever --split-by, --valid-lines "
        "and --duplicates say, and codes and vocabulary are not learnt on it",
        default=None,
    )
    pairs: tuple[str, ...] = knob(
        "the pairs to read of --parallel, both languages in --langs: as their files are called, en-fr,ar-en; can be "
        "given later too, for the same --destdir",
        default=(),
    )
    split_by: str | None = knob(
        "what goes to one split as a whole: a line, or a document (documents end at blank lines, also in what is "
        "written; default: line, of --wiki-dump document)",
        default=None,
        choices=("line", "document"),
    )
    valid_lines: int | None = knob(
        "lines per language held out for validation (default: 5000, at most a twentieth)",
        default=None,
        bounds="[1, inf)",
    )
    test_lines: int | None = knob(
        "lines per language held out for testing (default: 5000, at most a twentieth)",
        default=None,
        bounds="[1, inf)",
    )
    duplicates: str = knob(
        "a line that is also in a later split of train, valid, test: remove or keep it",
        default="remove",
        choices=("remove", "keep"),
    )
    seed: int = knob("decides the split and the sample that codes are learnt on", default=0)
    tokenizer: str = knob(
        "moses (sacremoses, with XLM's normalisation; zh, ja and th need xlm_ds[zh], [ja], [th]), or none for text "
        "that is tokenised already",
        default="moses",
        choices=("moses", "none"),
    )
    lowercase: bool = knob("lower-case the text, as XLM did for its XNLI models", default=False)
    remove_accents: bool = knob(
        "drop combining marks, as XLM did for its XNLI models; damages Hindi and Korean, among others",
        default=False,
    )
    bpe_codes: int = knob(
        "merges to learn (XLM: 80000 for 15 languages)", default=80000, bounds="[1, 10000000]"
    )
    bpe_alpha: float = knob(
        "codes are learnt on languages in shares p ∝ n^ALPHA, n their bytes of training text",
        default=0.5,
        bounds="[0, inf)",
    )
    bpe_sample_bytes: int = knob(
        "text that codes are learnt on, all languages together",
        default=1_000_000_000,
        bounds="[1, inf)",
    )
    codes: Path | None = knob("published codes to use instead of learning them", default=None)
    vocab: Path | None = knob(
        "published vocabulary that goes with --codes; becomes vocab_mlm", default=None
    )
    workers: int = knob(
        "processes; nothing written depends on it (default: all cores)",
        default=0,
        bounds="[0, 4096]",
    )
    overwrite: bool = knob(
        "redo what other settings or inputs than last time change, instead of refusing",
        default=False,
    )

    @property
    def unit(self) -> str:
        """What goes to one split as a whole: as --split-by says, or else the nature of the text."""
        return self.split_by or ("line" if self.wiki_dump is None else "document")


# --------------------------------------------------------------------------------------- binarize


@dataclass(frozen=True, slots=True, kw_only=True)
class BinarizeConfig:
    """fairseq-preprocess, as far as the cross-lingual recipe uses it."""

    task: str = knob("kind of data", default="cross_lingual_lm", choices=("cross_lingual_lm",))
    langs: tuple[str, ...] = knob("languages to binarize in one go, as ar,de,en", default=())
    source_lang: str | None = knob(
        "one language (the recipe's loop; --langs does all at once), or the first of parallel text",
        default=None,
        aliases=("-s",),
    )
    target_lang: str | None = knob(
        "the other language of parallel text: PREF.SOURCE and PREF.TARGET, where line i translates line i, become "
        "SPLIT.SOURCE-TARGET.SOURCE and .TARGET (with prepare's text, PREF is D/train.SOURCE-TARGET)",
        default=None,
        aliases=("-t",),
    )
    unaligned: str = knob(
        "lines of parallel text without a translation, as the other side's is empty or there are no more: stop, or "
        "skip them on both sides (right for different numbers of lines only if nothing but the end is missing)",
        default="refuse",
        choices=("refuse", "skip"),
    )
    only_source: bool = knob(
        "as fairseq's recipe has it; there is no other side unless --target-lang is given",
        default=False,
    )
    srcdict: Path | None = knob(
        "dictionary (lines `symbol count`); without it, one is built from the training text",
        default=None,
    )
    trainpref: str | None = knob(
        "training text is PREF.LANG, PREF,PREF… are joined; - is standard input (one language, with --srcdict)",
        default=None,
    )
    validpref: str | None = knob(
        "validation text is PREF.LANG; PREF,PREF… become valid, valid1, …", default=None
    )
    testpref: str | None = knob(
        "test text is PREF.LANG; PREF,PREF… become test, test1, …", default=None
    )
    bpe_codes: Path | None = knob(
        "split the text, tokenised only, with these codes on the way; the pairs are those of the text that "
        "fastBPE's applybpe would write",
        default=None,
    )
    bpe_vocab: Path | None = knob(
        "split it, with --bpe-codes, into pieces of this vocabulary (lines `word count`) and characters",
        default=None,
    )
    destdir: Path = knob("folder for dict.txt and the .bin/.idx pairs")
    workers: int = knob(
        "threads of a rank; the bytes written do not depend on it (default: all cores that the rank may use)",
        default=0,
        bounds="[0, 4096]",
    )
    dataset_impl: str = knob(
        "layout on disk: mmap is MMIDIDX (ids as uint16/uint32), lazy and cached are TNTIDX (int32)",
        default="mmap",
        choices=("mmap", "lazy", "cached"),
    )
    max_vocab: int | None = knob(
        "keep only the first rows of the dictionary so that the model has N rows, our 5 special symbols included",
        default=None,
        bounds="[6, inf)",
    )
    on_duplicate: str = knob(
        "a symbol that is twice in the dictionary: stop, or skip the later row as XLM does",
        default="error",
        choices=("error", "skip"),
    )
    thresholdsrc: int = knob(
        "building: leave out words seen less often", default=0, bounds="[0, inf)"
    )
    nwordssrc: int = knob(
        "building: at most N symbols, special ones included (-1: all)",
        default=-1,
        bounds="[-1, inf)",
    )
    padding_factor: int = knob(
        "building: fill up to a multiple of N with madeupword0000 …", default=8, bounds="[1, 65536]"
    )


# --------------------------------------------------------------------------------------- shards

_SHARDS_DICT = "dictionary of the pairs (default: dict.txt, or dict.LANG.txt, beside each)"
_SHARDS_OVERWRITE = "replace what is there, instead of refusing"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardsInspectConfig:
    """Shows what pairs hold."""

    pairs: tuple[Path, ...] = knob("pairs PATH/SPLIT.LANG, or folders of them", positional=True)
    lines: str | None = knob("show these lines as words: A:B, or one number from 0", default=None)
    blocks: str | None = knob("show these blocks as words, as training reads them", default=None)
    tokens_per_sample: int = knob(
        "length of a sample for --blocks: one eos and N - 1 tokens of text",
        default=256,
        bounds="[2, 1048576]",
    )
    json: bool = knob("one JSON object per pair and line, for programs", default=False)
    dict: Path | None = knob(_SHARDS_DICT, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardsVerifyConfig:
    """Checks every byte of pairs against their index, dictionary, counts and checksums; exit code 2 if one is bad."""

    pairs: tuple[Path, ...] = knob("pairs PATH/SPLIT.LANG, or folders of them", positional=True)
    dict: Path | None = knob(_SHARDS_DICT, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardsMergeConfig:
    """Joins pairs of one dictionary: the bytes that binarizing their texts one after another gives."""

    out: Path = knob("pair to write, PATH/SPLIT.LANG", positional=True)
    pairs: tuple[Path, ...] = knob("pairs to join, in this order", positional=True)
    dict: Path | None = knob(_SHARDS_DICT, default=None)
    overwrite: bool = knob(_SHARDS_OVERWRITE, default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardsReshardConfig:
    """Divides a pair at line ends into SPLIT.LANG, SPLIT.LANG1, SPLIT.LANG2, …, which fairseq reads as one."""

    pair: Path = knob("pair to divide, PATH/SPLIT.LANG", positional=True)
    destdir: Path = knob("folder for the shards")
    shards: int | None = knob("so many, of about as many tokens", default=None, bounds="[1, inf)")
    max_tokens: int | None = knob(
        "at most N tokens each; a longer line stands alone",
        default=None,
        bounds="[1, 9223372036854775807]",
    )
    max_bytes: int | None = knob(
        "a .bin of at most N bytes each; a longer line stands alone",
        default=None,
        bounds="[1, 9223372036854775807]",
    )
    dict: Path | None = knob(_SHARDS_DICT, default=None)
    overwrite: bool = knob(_SHARDS_OVERWRITE, default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardsConvertConfig:
    """Writes a pair in another layout; reads also XLM's TEXT.pth."""

    source: Path = knob("pair to read, PATH/SPLIT.LANG, or XLM's PATH.pth", positional=True)
    out: Path = knob("pair to write, PATH/SPLIT.LANG", positional=True)
    to: str = knob(
        "layout: mmap (fairseq's MMIDIDX), lazy or cached (TNTIDX), megatron (Megatron-LM's)",
        default="mmap",
        choices=("mmap", "lazy", "cached", "megatron"),
    )
    dict: Path | None = knob(
        "dictionary: of a pair, its own (default: dict.txt beside it); of a .pth, that of the result, whose words are "
        "found by their spelling (default: the one in the .pth)",
        default=None,
    )
    overwrite: bool = knob(_SHARDS_OVERWRITE, default=False)


# --------------------------------------------------------------------------------------- train


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What is read, in which order, and what is masked."""

    data: Path = knob("folder with dict.txt and {train,valid}.LANG.{bin,idx}", positional=True)
    task: str = knob("kind of data", default="cross_lingual_lm", choices=("cross_lingual_lm",))
    monolingual_langs: tuple[str, ...] = knob(
        "languages, as ar,de,en; the order typed gives the language ids (default: all in the folder)",
        default=(),
    )
    mlm_steps: tuple[str, ...] = knob(
        "languages and pairs to read, as en,de,en-de: a pair's rows are a line and its translation (default: "
        "--monolingual-langs alone, which else need only give the language ids)",
        default=(),
    )
    tlm_share: float = knob(
        "share of the samples that are pairs, where there are both (docs/decisions/0013-parallel-data.md)",
        default=0.5,
        bounds="(0, 1)",
    )
    tokens_per_sample: int = knob(
        "length of a sample: one eos and N - 1 tokens of text", default=256, bounds="[2, 1048576]"
    )
    sample_break_mode: str = knob(
        "none: blocks run across lines; eos: one line per sample; complete: as many whole lines as fit; complete_doc: "
        "the same, but empty lines end documents. Longer lines are cut at --tokens-per-sample",
        default="none",
        choices=("none", "eos", "complete", "complete_doc"),
    )
    sampling_alpha: Steps = knob(
        "a language with n blocks, and among pairs one of n, is drawn with p ∝ n^X (0.7: XLM paper; 0: uniform, as "
        "fairseq; 1: natural); "
        "0.7@0,0.5@100000 is 0.5 from update 100000 on (docs/decisions/0008-schedules.md)",
        default=Steps((0.7,)),
        bounds="[0, inf)",
    )
    mask_ratio: Steps = knob(
        "share of a sample's tokens to predict; 0.15@0,0.2@100000 is 0.2 from update 100000 on; validation and "
        "evaluation keep the first",
        default=Steps((0.15,)),
        bounds="(0, 1]",
    )
    whole_word_masking: bool = knob(
        "mask all subwords of a word (x@@ y@@ z), and as many tokens as without; also in validation and evaluation",
        default=False,
    )
    seed: int = knob(
        "decides initial weights, order, masks and dropout",
        default=0,
        bounds="[0, 18446744073709551615]",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of the network; what is not given is the architecture's."""

    arch: str = knob(
        "fairseq's xlm_base, or XLM's own network: xlm has its size, xlm_xnli15 and xlm_100 are those of its models of "
        "15 languages and of 17 or 100",
        default="xlm_base",
        choices=("xlm_base", "xlm", "xlm_xnli15", "xlm_100"),
    )
    encoder_layers: int | None = knob("layers", default=None, bounds="[1, inf)")
    encoder_embed_dim: int | None = knob("width", default=None, bounds="[1, inf)")
    encoder_ffn_embed_dim: int | None = knob(
        "width inside the feed-forward part", default=None, bounds="[1, inf)"
    )
    encoder_attention_heads: int | None = knob("attention heads", default=None, bounds="[1, inf)")
    dropout: float = knob(
        "dropout after embeddings, attention and feed-forward", default=0.1, bounds="[0, 1)"
    )
    attention_dropout: float = knob("dropout on attention weights", default=0.1, bounds="[0, 1)")
    activation_dropout: float = knob(
        "dropout inside the feed-forward part",
        default=0.0,
        bounds="[0, 1)",
        aliases=("--act-dropout",),
    )
    activation_fn: str | None = knob("activation", default=None, choices=("gelu", "relu"))
    num_segment: int | None = knob(
        "rows of the language embedding (0: there is none; default: the number of languages, with xlm_100 0)",
        default=None,
        bounds="[0, inf)",
    )
    max_positions: int | None = knob(
        "rows of the position table (default: --tokens-per-sample; of XLM's network, 512)",
        default=None,
        bounds="[1, inf)",
    )
    no_token_positional_embeddings: bool = knob("no position embedding", default=False)
    encoder_normalize_before: bool = knob(
        "LayerNorm on the sum of the embeddings (layers stay post-LN), as XLM's network always has",
        default=False,
    )
    init_output_bias: str = knob(
        "start of the output bias: log of the training unigram mixture, or zeros as fairseq",
        default="unigram",
        choices=("unigram", "zeros"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningConfig:
    """Optimizer and learning rate: numbers that a DeepSpeed JSON must leave "auto"."""

    optimizer: str = knob(
        "optimizer (its class is the DeepSpeed JSON's)", default="adam", choices=("adam",)
    )
    max_update: int = knob("stop after N updates (0: no limit)", default=0, bounds="[0, inf)")
    max_epoch: int = knob("stop after N epochs (0: no limit)", default=0, bounds="[0, inf)")
    lr: float = knob("learning rate", default=1e-4, bounds="(0, inf)")
    adam_betas: tuple[float, float] = knob("Adam's betas", default=(0.9, 0.999), bounds="[0, 1)")
    adam_eps: float = knob("Adam's epsilon (torch's form)", default=1e-8, bounds="[0, inf)")
    weight_decay: float = knob(
        "decoupled weight decay", default=0.0, bounds="[0, inf)", aliases=("--wd",)
    )
    clip_norm: float = knob("largest norm of the gradient (0: off)", default=0.0, bounds="[0, inf)")
    lr_scheduler: str = knob(
        "learning rate over the run",
        default="reduce_lr_on_plateau",
        choices=("reduce_lr_on_plateau", "inverse_sqrt", "linear", "cosine", "wsd"),
    )
    warmup_updates: int = knob("updates of linear warm-up", default=0, bounds="[0, inf)")
    warmup_init_lr: float = knob(
        "learning rate at update 0 of the warm-up", default=0.0, bounds="[0, inf)"
    )
    decay_updates: int | None = knob(
        "linear, cosine, wsd: the last N updates decay to --min-lr (default: all after the warm-up; wsd needs it)",
        default=None,
        bounds="[0, inf)",
    )
    min_lr: float = knob(
        "linear, cosine, wsd: learning rate at the end", default=0.0, bounds="[0, inf)"
    )
    lr_shrink: float = knob("plateau: factor", default=0.1, bounds="(0, 1)")
    lr_patience: int = knob(
        "plateau: shrink on the (N+1)-th validation without progress", default=0, bounds="[0, inf)"
    )
    lr_threshold: float = knob(
        "plateau: relative progress that counts", default=1e-4, bounds="[0, inf)"
    )
    stop_min_lr: float = knob("stop when the learning rate is this low (-1: never)", default=-1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizationConfig(LearningConfig):
    """Those, the batch and the loss of pretraining."""

    max_tokens: int = knob(
        "tokens per rank and micro-batch: floor(N / tokens-per-sample) rows",
        default=2048,
        bounds="[1, 2147483647]",
    )
    update_freq: int = knob("micro-batches per update", default=1, bounds="[1, inf)")
    global_batch_tokens: int | None = knob(
        "tokens per update over all ranks; decides the number of micro-batches instead of --update-freq",
        default=None,
        bounds="[1, inf)",
    )
    criterion: str = knob(
        "loss", default="legacy_masked_lm_loss", choices=("legacy_masked_lm_loss",)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonRunConfig:
    """Where a run lives, of training or fine-tuning, and when it saves, validates and speaks."""

    save_dir: Path = knob(
        "the run's folder: checkpoints, log, metrics, configuration", default=Path("checkpoints")
    )
    restore_file: str = knob(
        "checkpoint to continue from: a name in --save-dir, or a path", default="checkpoint_last"
    )
    save_interval_updates: int = knob(
        "also save every N updates (0: never); it validates with --validate-interval-updates",
        default=0,
        bounds="[0, inf)",
    )
    validate_interval_updates: int = knob(
        "also validate every N updates (0: never)", default=0, bounds="[0, inf)"
    )
    log_interval: int = knob("one line every N updates", default=100, bounds="[1, inf)")
    digest_interval: int = knob(
        "digest of the parameters for xlm-ds prove every N updates (0: never); that of the samples is every update's",
        default=1000,
        bounds="[0, inf)",
    )
    tensorboard_logdir: Path | None = knob(
        "TensorBoard's folder (default: SAVE_DIR/tensorboard)", default=None
    )
    stop_seconds: float = knob(
        "after Ctrl-C, SIGTERM or the loss of its launcher a rank ends within N seconds, saved or not; SIGUSR1 leaves "
        "all the time it takes",
        default=8.0,
        bounds="(0, inf)",
    )
    heartbeat_timeout: float = knob(
        "end the run when a rank has not answered the others for N seconds",
        default=600.0,
        bounds="[1, 31536000]",
    )
    max_skipped_updates: int = knob(
        "stop when N updates in a row were skipped because the gradient was not finite; in fp16 the loss scale decides",
        default=10,
        bounds="[1, inf)",
    )
    profile: int = knob(
        "trace N updates, the fifth and after, to SAVE_DIR/trace.json (0: none)",
        default=0,
        bounds="[0, inf)",
    )
    deepspeed_config: Path | None = knob(
        "DeepSpeed JSON: ZeRO stage, precision, offload (default: fp32 ZeRO 1 on a CPU, bf16 ZeRO 1 on a GPU)",
        default=None,
    )
    local_rank: int = knob("set by the launcher", default=0, aliases=("--local-rank",))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig(CommonRunConfig):
    """The same of pretraining."""

    init_from: Path | None = knob(
        "begin with the weights of another model, of this width: a run's or checkpoint's folder, fairseq's "
        "checkpoint.pt beside its dict.txt, XLM's .pth, or a folder of Hugging Face's",
        default=None,
    )
    save_interval: int = knob("save every N epochs", default=1, bounds="[1, inf)")
    no_epoch_checkpoints: bool = knob(
        "keep only checkpoint_last and checkpoint_best", default=False
    )
    keep_last_epochs: int = knob(
        "keep the last N epoch checkpoints (-1: all)", default=-1, bounds="[-1, inf)"
    )
    keep_interval_updates: int = knob(
        "keep the last N checkpoints of --save-interval-updates (-1: all)",
        default=-1,
        bounds="[-1, inf)",
    )
    validate_interval: int = knob("validate every N epochs", default=1, bounds="[1, inf)")
    retrieve_interval_updates: int = knob(
        "measure sentence retrieval on --retrieve-data every N updates (0: never)",
        default=0,
        bounds="[0, inf)",
    )
    retrieve_data: Path | None = knob(
        "raw text aligned line by line: a folder with LG1-LG2.LG1 and LG1-LG2.LG2, or PREF of PREF.LG1-LG2.LG1 …",
        default=None,
    )
    no_compile: bool = knob(
        "do not compile the layers on a GPU: slower, but without the minute it takes at the start",
        default=False,
    )
    dry_run: bool = knob(
        "say what the run would need and take on this machine, as xlm-ds plan does; start and write nothing",
        default=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    data: DataConfig
    model: ModelConfig
    optimization: OptimizationConfig
    run: RunConfig


# --------------------------------------------------------------------------------------- finetune


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneDataConfig:
    """The model, the labelled texts, and what is made of them."""

    model: Path = knob("a checkpoint's folder, or a run's: its best", positional=True)
    data: Path = knob(
        "folder with {train,valid,test}.LANG.tsv (label<TAB>text[<TAB>text]), XNLI's files, or "
        "{train,valid,test}.{s1,s2,label}.LANG",
        positional=True,
    )
    train_langs: tuple[str, ...] = knob(
        "languages to train on (default: all that have training texts)", default=()
    )
    test_langs: tuple[str, ...] = knob(
        "languages to validate and test on (default: all that have test texts)", default=()
    )
    stop_lang: str | None = knob(
        "language whose accuracy on the validation texts decides which checkpoint is the best (default: the mean of "
        "--train-langs)",
        default=None,
    )
    patience: int = knob(
        "end after N validations in a row without a better accuracy (0: never)",
        default=0,
        bounds="[0, inf)",
    )
    pooling: str = knob(
        "what is classified: the state of a text's first position, as in XLM, or the mean of all its positions",
        default="first",
        choices=("first", "mean"),
    )
    dropout: float | None = knob(
        "dropout in the network and before the classifier (default: the model's)",
        default=None,
        bounds="[0, 1)",
    )
    attention_dropout: float | None = knob(
        "dropout on attention weights (default: the model's)", default=None, bounds="[0, 1)"
    )
    random_weights: bool = knob(
        "begin with the network untrained: what the pretraining is worth", default=False
    )
    seed: int = knob(
        "decides the classifier's weights, order and dropout",
        default=0,
        bounds="[0, 18446744073709551615]",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneOptimizationConfig(LearningConfig):
    """Optimizer, learning rate and batch of fine-tuning."""

    batch_size: int = knob("examples per update over all ranks", default=32, bounds="[1, inf)")
    max_rows: int | None = knob(
        "examples per rank and micro-batch at most (default: a rank's share of the batch at once)",
        default=None,
        bounds="[1, inf)",
    )
    max_epoch: int = knob(
        "stop after N epochs (0: no limit; -1: 10, or no limit where --max-update is given)",
        default=-1,
        bounds="[-1, inf)",
    )
    lr: float = knob_like(LearningConfig, "lr", default=2.5e-5)
    lr_scheduler: str = knob_like(LearningConfig, "lr_scheduler", default="linear")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig:
    data: FinetuneDataConfig
    optimization: FinetuneOptimizationConfig
    run: CommonRunConfig


# --------------------------------------------------------------------------------------- supervise


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperviseConfig:
    """How often and when a failed run is started again."""

    restarts: int = knob(
        "start a failed run again at most N times, each only if the start before gained an update",
        default=10,
        bounds="[0, inf)",
    )
    first_pause: float = knob(
        "seconds before the first restart; each pause is twice the one before, up to ten minutes",
        default=10.0,
        bounds="[0, inf)",
    )
    no_preflight: bool = knob("do not look at the hosts of --hostfile first", default=False)


# --------------------------------------------------------------------------------------- plan


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDataConfig(DataConfig):
    """DataConfig, of data that need not be there yet."""

    data: Path | None = knob(  # type: ignore[assignment]
        "folder with dict.txt and train.LANG.{bin,idx}, or nothing: see --vocab-size",
        default=None,
        positional=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """Flags and files of train, and what it would run on."""

    data: PlanDataConfig
    model: ModelConfig
    optimization: OptimizationConfig
    run: RunConfig
    vocab_size: int | None = knob(
        "rows of the dictionary, 5 special symbols included (default: of DATA)",
        default=None,
        bounds="[6, inf)",
    )
    languages: int | None = knob(
        "number of languages (default: those of --monolingual-langs or DATA, or 15)",
        default=None,
        bounds="[1, inf)",
    )
    gpu: str = knob("GPU, or cpu for this machine's", default="h100", choices=(*GPUS, "cpu"))
    gpus: int = knob("ranks, each with a GPU", default=1, bounds="[1, inf)")
    gpus_per_node: int = knob("ranks of a machine", default=8, bounds="[1, inf)")
    bandwidth: float = knob(
        "of the network, GB/s in and out of a machine (12.5 are 100 Gbit/s)",
        default=12.5,
        bounds="(0, inf)",
    )
    scale: bool = knob(
        "also say what 8 to 1,024 GPUs would reach in ZeRO 1, 2 and 3", default=False
    )


# --------------------------------------------------------------------------------------- preflight


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightDataConfig(DataConfig):
    """DataConfig, where data may be left out of the check."""

    data: Path | None = knob(  # type: ignore[assignment]
        "folder with dict.txt and {train,valid}.LANG.{bin,idx}: compared where given",
        default=None,
        positional=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightConfig:
    """Flags and files of train, and the hosts that it would run on."""

    data: PreflightDataConfig
    model: ModelConfig
    optimization: OptimizationConfig
    run: RunConfig
    hostfile: Path = knob("lines NAME slots=N, as the deepspeed launcher reads them")
    master_addr: str | None = knob(
        "address of the first host for the others (default: the first of its hostname -I, as DeepSpeed does)",
        default=None,
    )
    master_port: int = knob(
        "port of the first host that the ranks meet at", default=29500, bounds="[1, 65535]"
    )
    ssh_port: int | None = knob("port of the hosts' ssh", default=None, bounds="[1, 65535]")
    timeout: int = knob(
        "seconds that a host may take for each step of the check", default=60, bounds="[1, 3600]"
    )


# --------------------------------------------------------------------------------------- evaluate


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """Perplexity and accuracy of a checkpoint on one split."""

    checkpoint: Path = knob("a checkpoint's folder, or a run's: its best", positional=True)
    data: Path = knob("folder with dict.txt and SPLIT.LANG.{bin,idx}", positional=True)
    split: str = knob("split to evaluate", default="test", choices=("train", "valid", "test"))
    monolingual_langs: tuple[str, ...] = knob(
        "languages (default: what it was trained on and DATA has)", default=()
    )
    mlm_steps: tuple[str, ...] = knob(
        "languages and pairs, as en,de,en-de (default: what it was trained on and DATA has)",
        default=(),
    )
    mask_draws: int = knob("fixed mask draws to average over", default=3, bounds="[1, inf)")
    xlm_masks: bool = knob(
        "also measure as XLM's own evaluation does, for figures beside published ones",
        default=False,
    )
    max_tokens: int = knob(
        "tokens per rank and micro-batch; the result does not depend on it",
        default=8192,
        bounds="[1, 2147483647]",
    )
    seed: int = knob("decides the mask draws", default=0, bounds="[0, 18446744073709551615]")
    output: Path | None = knob(
        "JSON file for the figures (default: CHECKPOINT-SPLIT.json beside the checkpoint; none where languages or "
        "pairs are named)",
        default=None,
    )
    local_rank: int = knob("set by the launcher", default=0, aliases=("--local-rank",))


# --------------------------------------------------------------------------------------- convert


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertConfig:
    """A model of another library, or for another library."""

    source: Path = knob(
        "a run's folder (its best) or a checkpoint's, fairseq's checkpoint.pt, XLM's checkpoint.pth, or a folder of "
        "Hugging Face's",
        positional=True,
    )
    out: Path = knob("folder to write", positional=True)
    to: str = knob("whose model to write", choices=("xlm_ds", "fairseq", "hugging-face"))
    dict: Path | None = knob(
        "of fairseq's models, dict.txt of the data that they were trained on (default: beside the model)",
        default=None,
    )
    langs: tuple[str, ...] = knob(
        "languages by their ids, as ar,de,en, of a model that names none or names them otherwise",
        default=(),
    )


# --------------------------------------------------------------------------------------- fill


@dataclass(frozen=True, slots=True, kw_only=True)
class FillConfig:
    """The best words for masked positions."""

    checkpoint: Path = knob("a checkpoint's folder, or a run's: its best", positional=True)
    texts: tuple[str, ...] = knob(
        "raw texts, with <mask> for each word to fill (default: the lines of standard input)",
        default=(),
        positional=True,
    )
    language: str = knob("the language of the texts")
    top: int = knob("words for each mask", default=5, bounds="[1, inf)")


# --------------------------------------------------------------------------------------- retrieve


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrieveConfig:
    """Accuracy of finding each line's translation."""

    checkpoint: Path = knob("a checkpoint's folder, or a run's: its best", positional=True)
    files: tuple[Path, ...] = knob(
        "raw texts, two and two aligned line by line: FILE_A FILE_B [FILE_A FILE_B …]",
        positional=True,
    )
    languages: tuple[str, ...] = knob(
        "of each file, as en,fr (default: what the file's name ends with, after its last point)",
        default=(),
    )
    batch_size: int = knob("lines encoded at a time", default=32, bounds="[1, inf)")
    output: Path | None = knob(
        "JSON file for the figures (default: none is written)",
        default=None,
    )


# --------------------------------------------------------------------------------------- report


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """A run as one page, or several compared."""

    runs: tuple[Path, ...] = knob("folders of runs (their --save-dir)", positional=True)
    output: Path | None = knob(
        "file to write: .html, or of one run .png, .pdf or .svg of its losses alone (default: report.html in the run's "
        "folder, of several runs comparison.html in that of the first)",
        default=None,
    )
    watch: bool = knob(
        "write it again every 30 seconds until all runs have ended so that nothing starts them again",
        default=False,
    )


# --------------------------------------------------------------------------------------- prove


@dataclass(frozen=True, slots=True, kw_only=True)
class ProveConfig:
    """Two runs that should be the same."""

    run_a: Path = knob("a run's folder (its --save-dir)", positional=True)
    run_b: Path = knob("the folder of another", positional=True)


# --------------------------------------------------------------------------------------- languages


def check_languages(languages: Sequence[str], flag: str) -> None:
    """Raises InputError unless each is there once and can be part of a file's name."""
    for language in languages:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", language):
            raise InputError(
                f"{flag}: {language!r} is no name of a language; use letters, digits, - and _, with commas between"
            )
        if language in ("bin", "idx"):
            raise InputError(
                f"{flag}: {language} is what pairs of files end with; give another name"
            )
    for language in languages:
        if languages.count(language) > 1:
            raise InputError(f"{flag}: {language} is named twice")
