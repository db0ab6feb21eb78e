"""The flags and files of fairseq, XLM and Hugging Face's run_mlm.py: what has become of each here, and why.

The parser answers from these tables, and docs/coming-from.md is written from them:

    python -m xlm_ds.peer_flags > docs/coming-from.md

A line is `--flag --flag … | verdict | why`. same: typed here as there. changed: another name or another meaning; under a
name that is not ours it is refused with the sentence. ignored: accepted and answered with the sentence, as it decides
nothing here; `ignored, no value` of a flag that stands alone. refused: with the sentence, as nothing here does that.

Sources: fairseq 3d262bb, fairseq/options.py and dataclass/configs.py, tasks, models and optimizers of the recipe; XLM
cd281d3, train.py and preprocess.py; transformers 5.23.0, TrainingArguments, and examples/pytorch/language-modeling/run_mlm.py.
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from xlm_ds.flags import PeerFlag
from xlm_ds.log import EXIT_OK, InputError, run_stage


class Peer(NamedTuple):
    """One program of theirs, and the stage here that takes its place."""

    program: str
    stage: str
    flags: tuple[PeerFlag, ...]


def _flags(program: str, table: str) -> tuple[PeerFlag, ...]:
    return tuple(
        PeerFlag(flag, verdict.split(",")[0], why, not verdict.endswith("no value"), program)
        for names, verdict, why in _lines(table)
        for flag in names.split()
    )


def _lines(table: str) -> Iterator[tuple[str, str, str]]:
    for line in table.strip().splitlines():
        names, verdict, why = (part.strip() for part in line.split("|", 2))
        yield names, verdict, why


# --------------------------------------------------------------------------------------- fairseq

_PREPROCESS = "fairseq-preprocess"
FAIRSEQ_PREPROCESS = _flags(
    _PREPROCESS,
    """
    --task | same | cross_lingual_lm
    -s --source-lang | same | a loop over languages works as printed; --langs does all at once
    -t --target-lang | changed | of parallel text, for TLM; there it names the other side of a translation
    --trainpref --validpref --testpref | same |
    --destdir | same | files are train.LG.bin and dict.txt, without the -None.LG and dict.LG.txt that the recipe renames
    --srcdict | same | bytes equal to fairseq's, also for words that are twice (--on-duplicate)
    --thresholdsrc --nwordssrc --padding-factor | same | of a dictionary that is built
    --workers | changed | threads; the bytes do not depend on it, and CR and CRLF are no trouble
    --dataset-impl | same | mmap, lazy, cached
    --only-source | same |
    --joined-dictionary | ignored, no value | one dict.txt serves all languages anyway
    --tgtdict --thresholdtgt --nwordstgt | refused | one dict.txt serves both sides; leave it out
    --dict-only | refused | a dictionary is built when text is binarized; prepare writes vocab_mlm without binarizing
    --alignfile --align-suffix | refused | word alignments are not used in masked language modelling
    --seed --log-interval --log-format --log-file --no-progress-bar --tensorboard-logdir --wandb-project --azureml-logging --cpu --tpu --fp16 --bf16 --amp --profile --user-dir --scoring --optimizer --lr-scheduler --criterion --empty-cache-freq --all-gather-list-size --model-parallel-size --reset-logging --suppress-crashes --quantization-config-path | refused | decides nothing when text is binarized; leave it out
    --bpe --tokenizer | refused | prepare tokenises and splits, and binarize --bpe-codes splits on the way
    """,
)

_TRAIN = "fairseq-train"
FAIRSEQ_TRAIN = _flags(
    _TRAIN,
    """
    --task | same | cross_lingual_lm
    --monolingual-langs | same | the order typed gives the language ids
    --tokens-per-sample | same | any length that memory allows: attention keeps nothing that grows with its square
    --shuffle | ignored, no value | samples are always drawn in a random order, a function of seed and sample number
    --dataset-impl | ignored | the format is recognised from the files; the flag decides nothing
    --num-workers | ignored | batches are filled in C++ as they are needed; there are no loader processes
    --data-buffer-size | ignored | nothing is read ahead
    --skip-invalid-size-inputs-valid-test | ignored, no value | no sample has an invalid size
    --max-tokens | changed | tokens per rank and micro-batch, as there; floor(N / tokens-per-sample) whole rows of one static shape
    --max-sentences --batch-size | changed | --max-tokens, or --global-batch-tokens for all ranks together
    --required-batch-size-multiple | ignored | no batch is dropped, so nothing needs a multiple
    --max-sentences-valid --batch-size-valid --max-tokens-valid | refused | validation uses --max-tokens; its result does not depend on it
    --train-subset --valid-subset --gen-subset --curriculum --num-shards --shard-id | refused | train reads train, validates on valid, and evaluate --split says which
    --validate-interval --validate-interval-updates | same |
    --fixed-validation-seed | ignored | validation always has the same masks
    --validate-after-updates --disable-validation | refused | --validate-interval says how often validation is; it is always there
    --max-epoch --max-update --stop-min-lr | same |
    --stop-time-hours | refused | send SIGTERM: the run saves, ends with 75 and goes on when started again
    --clip-norm | same |
    --sentence-avg | refused | the gradient is the mean over all masked tokens of the batch
    --update-freq | same | the batch stays when the number of ranks changes, so it is not multiplied again
    --lr | changed | one number; there a list of one per epoch is possible
    --optimizer | changed | adam; its class is the DeepSpeed JSON's
    --adam-betas --adam-eps --weight-decay --wd | same | weight decay is decoupled
    --use-old-adam --fp16-adam-stats | refused | the optimizer is DeepSpeed's fused Adam
    --lr-scheduler | changed | reduce_lr_on_plateau and inverse_sqrt as there, linear for polynomial_decay, cosine, wsd
    --lr-shrink --lr-patience --lr-threshold | same | the counters are saved; there they begin anew on resume
    --warmup-updates | same |
    --warmup-init-lr | changed | 0 by default; there -1, which means 0 or --lr
    --min-lr | changed | where a schedule ends; to stop at a rate is --stop-min-lr
    --end-learning-rate --total-num-update --power --force-anneal --lr-period-updates --t-mult --max-lr | changed | --lr-scheduler linear or cosine, with --decay-updates, --min-lr and --max-update
    --save-dir --save-interval --save-interval-updates --keep-interval-updates --keep-last-epochs --no-epoch-checkpoints | same |
    --restore-file | same | continues the same run, with moments and order
    --finetune-from-model | changed | --init-from
    --reset-optimizer --reset-dataloader --reset-lr-scheduler --reset-meters --optimizer-overrides | refused | begin a new run with the weights: --init-from
    --no-save --no-last-checkpoints --no-save-optimizer-state --keep-best-checkpoints --checkpoint-suffix | refused | there are checkpoint_last, _previous and _best; convert --to xlm_ds leaves the optimizer out
    --best-checkpoint-metric --maximize-best-checkpoint-metric | refused | the best is by the loss on all validation text
    --patience | refused | pretraining ends by --max-update, --max-epoch or --stop-min-lr
    --criterion | same | legacy_masked_lm_loss
    --masked-lm-only | ignored, no value |
    --nsp-loss-weight --sent-loss --sentence-class-num | refused | there is no next-sentence loss; finetune classifies sentences
    --arch | same | xlm_base, and XLM's own network: xlm, xlm_xnli15, xlm_100
    --encoder-layers --encoder-embed-dim --encoder-ffn-embed-dim --encoder-attention-heads --num-segment | same |
    --dropout --attention-dropout --act-dropout --activation-fn --encoder-normalize-before --no-token-positional-embeddings | same |
    --max-positions | changed | rows of the position table; there --tokens-per-sample decides it
    --share-encoder-input-output-embed --encoder-learned-pos --apply-bert-init | ignored, no value | it is always so, as in xlm_base
    --pooler-activation-fn --pooler-dropout | refused | the pooler, which the loss does not depend on, is not there
    --seed | changed | 0 by default, there 1; a value gives other numbers than there
    --log-interval --tensorboard-logdir | same |
    --log-format --log-file | ignored | SAVE_DIR/train.log and metrics.jsonl are always written
    --no-progress-bar | ignored, no value | there is none; SAVE_DIR/train.log has a line every --log-interval updates
    --wandb-project --azureml-logging | refused | DeepSpeed's monitors get the figures: see its JSON, --deepspeed_config
    --profile | changed | the number of updates to trace to SAVE_DIR/trace.json
    --fp16 | ignored, no value | precision is the DeepSpeed JSON's; a GPU runs in bf16 by default, and in fp16 with zero1_fp16.json
    --bf16 --amp --memory-efficient-fp16 --memory-efficient-bf16 --fp16-init-scale --fp16-scale-window --fp16-scale-tolerance --min-loss-scale --threshold-loss-scale --fp16-no-flatten-grads | refused | precision and loss scale are the DeepSpeed JSON's: --deepspeed_config
    --cpu --tpu | refused | DS_ACCELERATOR=cpu leaves a GPU alone
    --ddp-backend | ignored | gradients go through DeepSpeed ZeRO; see --deepspeed_config
    --zero-sharding --cpu-offload --bucket-cap-mb --broadcast-buffers --find-unused-parameters --fast-stat-sync | refused | ZeRO's stage, offload and buckets are the DeepSpeed JSON's: --deepspeed_config
    --distributed-world-size | ignored | the launcher decides the number of ranks
    --distributed-rank --distributed-backend --distributed-init-method --distributed-port --distributed-no-spawn --device-id --nprocs-per-node --fix-batches-to-gpus | refused | the launcher decides it: deepspeed --hostfile, torchrun or mpirun
    --heartbeat-timeout | changed | the run ends, everywhere, when a rank has not answered for so long; 600 by default
    --user-dir --bpe --tokenizer --scoring | refused | there are no plug-ins; prepare tokenises and splits
    --mask-prob --leave-unmasked-prob --random-token-prob --freq-weighted-replacement --mask-multiple-length --mask-stdev | changed | of its masked_lm task; --mask-ratio, and 80/10/10 as in its cross_lingual_lm
    --mask-whole-words | changed | --whole-word-masking; the words are known by the marks of BPE
    --encoder-layerdrop --encoder-layers-to-keep --quant-noise-pq --quant-noise-pq-block-size --quant-noise-scalar --untie-weights-roberta --layernorm-embedding --spectral-norm-classification-head | refused | no network here has it
    --checkpoint-activations --offload-activations --min-params-to-wrap | refused | memory is what plan says; lower --max-tokens and raise --update-freq
    --max-valid-steps --combine-valid-subsets --ignore-unused-valid-subsets --required-seq-len-multiple --skip-remainder-batch --grouped-shuffling --update-epoch-batch-itr --update-ordered-indices-seed | refused | all validation text is used, and no batch is dropped
    --empty-cache-freq --all-gather-list-size --model-parallel-size --distributed-wrapper --distributed-num-procs --tpu-data-parallel --use-plasma-view --plasma-path --suppress-crashes --reset-logging --quantization-config-path | refused | nothing here does that; leave it out
    --pipeline-model-parallel --pipeline-balance --pipeline-devices --pipeline-chunks --slowmo-algorithm --slowmo-momentum --slowmo-base-algorithm --localsgd-frequency --nprocs --use-bmuf --gradient-as-bucket-view --ddp-comm-hook --no-reshard-after-forward --fp32-reduce-scatter --use-sharded-state | refused | ranks share by DeepSpeed ZeRO: --deepspeed_config
    --store-ema --ema-decay --ema-start-update --ema-seed-model --ema-update-freq --ema-fp32 | refused | no average of the weights is kept
    --continue-once --write-checkpoints-asynchronously --save-async --load-checkpoint-on-all-dp-ranks --s3-upload-path | refused | checkpoints are written by all ranks, beside training, and resumed by the same command
    --amp-batch-retries --amp-init-scale --amp-scale-window --on-cpu-convert-precision | refused | precision and loss scale are the DeepSpeed JSON's: --deepspeed_config
    --local_rank | same | set by the launcher
    """,
)

# -------------------------------------------------------------------------------------------- XLM

_XLM = "XLM"
XLM_TRAIN = _flags(
    _XLM,
    """
    --data_path | changed | the folder that binarize wrote, as the first argument; .pth are converted by shards convert
    --lgs | changed | --monolingual-langs ar,de,en, in the order of their ids (there alphabetical); other separators
    --mlm_steps | changed | the same steps, en,de,en-de; those drawn together are not updates of their own, as a batch mixes them
    --clm_steps --mt_steps --ae_steps --bt_steps --pc_steps --lambda_clm --lambda_mt --lambda_ae --lambda_bt --lambda_pc | refused | masked language modelling and TLM (--mlm-steps) are all there is
    --lambda_mlm | changed | --tlm-share for pairs, --sampling-alpha for languages
    --lg_sampling_factor | changed | --sampling-alpha: p ∝ n^X over blocks; there over sentences
    --bptt | changed | --tokens-per-sample, with its eos
    --max_len --group_by_size --max_batch_size --context_size --split_data | refused | rows have one length; longer pairs are cut
    --batch_size --tokens_per_batch | changed | --max-tokens per rank, --global-batch-tokens over all
    --accumulate_gradients | changed | --update-freq, in any precision
    --epoch_size --max_epoch | changed | --max-update, or --max-epoch: an epoch is all blocks once, whatever the number of ranks
    --emb_dim --n_layers --n_heads | changed | --arch xlm with --encoder-embed-dim, --encoder-layers, --encoder-attention-heads; the feed-forward width is --encoder-ffn-embed-dim
    --dropout --attention_dropout | changed | 0.1 by default, there 0
    --gelu_activation | changed | --activation-fn gelu, which is the default; there relu is
    --use_lang_emb | changed | --num-segment 0 leaves the table out
    --share_inout_emb --encoder_only | refused | the output's matrix is always the token embedding, and there is no decoder
    --sinusoidal_embeddings --use_memory --asm --asm_cutoffs --asm_div_value --n_dec_layers --mem_implementation --mem_enc_positions --mem_dec_positions | refused | no network here has it
    --env_seed | changed | --seed
    --word_pred | changed | --mask-ratio; exactly so many tokens are masked, not about so many
    --sample_alpha --word_mask_keep_rand | refused | words are masked uniformly, 80 % shown as the mask, 10 % kept, 10 % random
    --word_shuffle --word_dropout --word_blank | refused | of a denoising autoencoder, which is not here
    --max_vocab | changed | binarize --max-vocab, our 5 special symbols included
    --min_count | changed | binarize --thresholdsrc where a dictionary is built
    --optimizer | changed | adam, its numbers as --lr, --adam-betas, --adam-eps, --weight-decay; adam_inverse_sqrt is --lr-scheduler inverse_sqrt
    --clip_grad_norm | changed | --clip-norm (0: off); there 5 by default
    --stopping_criterion --validation_metrics | refused | the best is by the loss on all validation text; end by --max-update or --stop-min-lr
    --reload_model --reload_emb | changed | --init-from, also XLM's own .pth
    --reload_checkpoint | changed | the same command goes on by itself; another place is --restore-file
    --dump_path --exp_name --exp_id | changed | --save-dir
    --save_periodic | changed | --save-interval
    --eval_only --eval_bleu --beam_size --length_penalty --early_stopping | changed | evaluate --xlm-masks gives its figures and names; nothing is generated
    --fp16 | ignored, no value | precision is the DeepSpeed JSON's; a GPU runs in bf16 by default, and in fp16 with zero1_fp16.json
    --amp | refused | precision is the DeepSpeed JSON's: --deepspeed_config
    --debug_train --debug_slurm --debug | refused | --dry-run says what a run would need; its log is SAVE_DIR/train.log
    --local_rank | same | set by the launcher
    --master_port | refused | the launcher's: deepspeed --master_port
    """,
)

# ---------------------------------------------------------------------------------------- run_mlm

_RUN_MLM = "run_mlm.py"
RUN_MLM = _flags(
    _RUN_MLM,
    """
    --model_name_or_path | changed | --init-from FOLDER begins with its weights; the dictionary stays the data's
    --model_type --config_name --config_overrides | changed | --arch and the flags of its sizes
    --tokenizer_name --use_fast_tokenizer | refused | prepare learns codes, or takes published ones: --codes, --vocab
    --cache_dir --model_revision --token --trust_remote_code --dtype | refused | nothing is downloaded, and no code of a model is run
    --dataset_name --dataset_config_name --streaming | refused | text files: prepare --input, then binarize; they are mapped, not loaded
    --train_file --validation_file | changed | prepare --trainpref, --validpref, one file per language
    --validation_split_percentage | changed | prepare --valid-lines
    --overwrite_cache | changed | prepare --overwrite; binarize does again what has changed
    --max_seq_length | changed | --tokens-per-sample
    --preprocessing_num_workers | changed | --workers of prepare and binarize
    --mlm_probability | changed | --mask-ratio; exactly so many tokens, a function of seed and sample
    --line_by_line | changed | --sample-break-mode eos; complete packs whole lines
    --pad_to_max_length | refused | rows are packed full; lines of --sample-break-mode eos are always padded to one length
    --max_train_samples --max_eval_samples | refused | give less text
    --output_dir | changed | --save-dir
    --do_train --do_eval --do_predict | changed | train validates while it trains; evaluate is its own command
    --per_device_train_batch_size | changed | --max-tokens: tokens, not rows, per rank and micro-batch
    --per_device_eval_batch_size --eval_accumulation_steps --eval_do_concat_batches --eval_use_gather_object --batch_eval_metrics --prediction_loss_only --include_for_metrics --bf16_full_eval --fp16_full_eval | refused | validation uses --max-tokens and the run's precision; its result does not depend on the batch
    --gradient_accumulation_steps | changed | --update-freq, or --global-batch-tokens, which does not change with the ranks
    --average_tokens_across_devices | refused | the gradient is always the mean over all masked tokens of the batch
    --auto_find_batch_size | refused | train --dry-run says what fits
    --num_train_epochs | changed | --max-epoch
    --max_steps | changed | --max-update
    --learning_rate | changed | --lr
    --lr_scheduler_type --lr_scheduler_kwargs | changed | --lr-scheduler linear, cosine, inverse_sqrt, reduce_lr_on_plateau or wsd, with --decay-updates and --min-lr
    --warmup_steps | changed | --warmup-updates
    --weight_decay | same | decoupled
    --adam_beta1 --adam_beta2 | changed | --adam-betas B1,B2
    --adam_epsilon | changed | --adam-eps
    --optim --optim_args --optim_target_modules | changed | --optimizer adam; its class is the DeepSpeed JSON's
    --max_grad_norm | changed | --clip-norm; 0, off, by default, there 1
    --label_smoothing_factor --neftune_noise_alpha | refused | the loss is the masked tokens' cross-entropy
    --bf16 --tf32 | refused | precision is the DeepSpeed JSON's: --deepspeed_config
    --fp16 | ignored, no value | precision is the DeepSpeed JSON's; a GPU runs in bf16 by default, and in fp16 with zero1_fp16.json
    --gradient_checkpointing --gradient_checkpointing_kwargs --activation_checkpointing --activation_checkpointing_kwargs --torch_empty_cache_steps | refused | memory is what plan says; lower --max-tokens and raise --update-freq
    --torch_compile --torch_compile_backend --torch_compile_mode | changed | layers are compiled on a GPU; --no-compile leaves it out
    --use_liger_kernel --liger_kernel_config | refused | the fused cross-entropy is our own, on masked positions only
    --use_cache | refused | nothing is generated
    --logging_steps --logging_strategy | changed | --log-interval
    --logging_first_step --logging_nan_inf_filter --log_on_each_node --log_level --log_level_replica --disable_tqdm --include_num_input_tokens_seen | refused | rank 0 speaks, SAVE_DIR/logs has every rank, and metrics.jsonl every figure
    --report_to --run_name --project --trackio_space_id --trackio_bucket_id --trackio_static_space_id | changed | TensorBoard always; DeepSpeed's monitors by its JSON, --deepspeed_config
    --eval_strategy --eval_steps --eval_delay --eval_on_start | changed | --validate-interval, --validate-interval-updates
    --save_strategy --save_steps | changed | --save-interval, --save-interval-updates
    --save_total_limit | changed | --keep-interval-updates, --keep-last-epochs
    --save_only_model | changed | a run's checkpoints go on; convert --to xlm_ds leaves the optimizer out
    --save_on_each_node --enable_jit_checkpoint | refused | --save-dir is a folder that all hosts see; SIGTERM saves
    --push_to_hub --hub_token --hub_private_repo --hub_model_id --hub_strategy --hub_always_push --hub_revision | refused | convert --to hugging-face writes a folder that can be uploaded
    --load_best_model_at_end --metric_for_best_model --greater_is_better | refused | checkpoint_best is by the loss on all validation text
    --resume_from_checkpoint | changed | the same command goes on by itself, at the very sample; another place is --restore-file
    --ignore_data_skip --restore_callback_states_from_checkpoint | refused | resuming reads nothing again
    --full_determinism | refused | a CPU run is bit-equal to its repetition; xlm-ds prove compares two runs
    --seed | changed | 0 by default, there 42; it decides weights, order, masks and dropout
    --data_seed | refused | --seed decides the order too
    --use_cpu | refused | DS_ACCELERATOR=cpu leaves a GPU alone
    --deepspeed | changed | --deepspeed_config; learning rate, batch and clipping stay "auto" there
    --overwrite_output_dir | refused | a run goes on; another one needs another --save-dir
    --evaluation_strategy | changed | --validate-interval, --validate-interval-updates
    --logging_dir | changed | --tensorboard-logdir
    --include_inputs_for_metrics | refused | validation measures the loss on all validation text
    --warmup_ratio | changed | --warmup-updates, a number of updates
    --no_cuda --use_mps_device --use_ipex --tpu_num_cores | refused | DS_ACCELERATOR=cpu leaves a GPU alone
    --per_gpu_train_batch_size --per_gpu_eval_batch_size --split_batches --dispatch_batches --group_by_length | changed | --max-tokens: tokens, not rows, per rank and micro-batch; rows have one length
    --adafactor | refused | the optimizer is DeepSpeed's fused Adam
    --half_precision_backend --fp16_backend --fp16_opt_level --torch_dtype | refused | precision is the DeepSpeed JSON's: --deepspeed_config
    --use_auth_token --low_cpu_mem_usage --push_to_hub_model_id --push_to_hub_organization --push_to_hub_token | refused | nothing is downloaded or uploaded
    --save_safetensors | refused | checkpoints are always safetensors
    --sharded_ddp --past_index --mp_parameters --ray_scope --torchdynamo --jit_mode_eval | refused | nothing here does that; leave it out
    --fsdp --fsdp_config --accelerator_config --parallelism_config | refused | ranks share by DeepSpeed ZeRO: --deepspeed_config
    --dataloader_drop_last --dataloader_num_workers --dataloader_pin_memory --dataloader_persistent_workers --dataloader_prefetch_factor --dataloader_multiprocessing_context --dataloader_in_order | refused | batches are filled in C++ as they are needed; there are no loader processes, and no batch is dropped
    --remove_unused_columns --label_names --train_sampling_strategy --length_column_name | refused | data has no columns; samples are drawn by --sampling-alpha
    --ddp_backend | ignored | gradients go through DeepSpeed ZeRO; see --deepspeed_config
    --ddp_find_unused_parameters --ddp_bucket_cap_mb --ddp_broadcast_buffers --ddp_static_graph | refused | gradients go through DeepSpeed ZeRO: --deepspeed_config
    --ddp_timeout | changed | --heartbeat-timeout
    --debug --skip_memory_metrics | refused | metrics.jsonl has the peak memory
    --local_rank | same | set by the launcher
    """,
)

PEERS = (
    Peer(_PREPROCESS, "binarize", FAIRSEQ_PREPROCESS),
    Peer(_TRAIN, "train", FAIRSEQ_TRAIN),
    Peer("XLM's train.py", "train", XLM_TRAIN),
    Peer(_RUN_MLM, "train", RUN_MLM),
)
# What the parser of a stage is told: where several programs have a flag, the first of them speaks.
BINARIZE_FLAGS = FAIRSEQ_PREPROCESS
TRAIN_FLAGS = (
    PeerFlag(
        "--deepspeed", "ignored", "", False, "DeepSpeed"
    ),  # its scripts have it beside --deepspeed_config
    *FAIRSEQ_TRAIN,
    *XLM_TRAIN,
    *RUN_MLM,
)

# ------------------------------------------------------------------------------------------ files

FILES = {
    "fairseq": """
    dict.txt, vocab_mlm | same, byte for byte; dict.LG.txt too where all are the same
    train.LG.bin, .idx and shards train.LG1 | same, byte for byte, mmap (MMIDIDX) and lazy or cached (TNTIDX); `.json` and `.counts.npy` stand beside what we write
    train.LG-None.LG.bin | read as they are: nothing has to be renamed
    checkpoint_best.pt | `xlm-ds convert`, `train --init-from`; also with cfg or fused in_proj weights, as later and earlier versions have it. Not continued: no moments are read
    model.pt, which `convert --to fairseq` writes | for fairseq's own loader (not tried in fairseq itself, which does not install), with `data` overridden by its folder, where dict.txt is; masked_lm_pooler is 0, as the loss does not depend on it
    preprocess.log | its lines are in DESTDIR/preprocess.log too; the log of training is another: SAVE_DIR/train.log, metrics.jsonl
    """,
    "XLM": """
    codes, vocab | same: `prepare --codes --vocab`, `binarize --bpe-codes --srcdict`; words that are twice with `--on-duplicate skip`
    train.en (text after BPE) | same: `binarize --trainpref`
    train.en.pth | `xlm-ds shards convert train.en.pth OUT/train.en`
    en-fr.en.train.pth (pairs) | `shards convert` makes both sides; name them train.en-fr.en and train.en-fr.fr
    checkpoint.pth, best-*.pth, mlm_*.pth | `xlm-ds convert`, `train --init-from`, with and without `module.` and language embeddings; not adaptive softmax or memory layers
    params.pkl | not read; what a model needs is in its .pth
    preprocess.py VOCAB TEXT | `binarize --srcdict VOCAB --trainpref …`
    train.log | SAVE_DIR/train.log; `evaluate --xlm-masks` gives XLM's names of figures
    """,
    "Hugging Face": """
    config.json with model.safetensors or pytorch_model.bin | `xlm-ds convert`, `train --init-from`: xlm, bert, roberta, xlm-roberta, camembert. A pickle is read by the reader that runs nothing
    vocab.json, merges.txt of XLM | the dictionary and the codes; texts must be tokenised (Moses) as there
    tokenizer.json, vocab.txt | words of the dictionary only: text is not split by them here
    sentencepiece.bpe.model | not read; save the tokenizer with its tokenizer.json
    datasets (Arrow) | write text files, one per language
    trainer_state.json, optimizer.pt, scheduler.pt, rng_state.pth | not read: a run begins with the weights alone
    what `convert --to hugging-face` writes | BertForMaskedLM (token types are the languages, in the order of config.json's lang2id) or XLMWithLMHeadModel, with tokenizer; loaded by `AutoModelForMaskedLM` and `AutoTokenizer`
    """,
}


def document() -> str:
    """docs/coming-from.md."""
    parts = [_HEAD]
    for title, peers in (
        ("fairseq", PEERS[:2]),
        ("XLM", PEERS[2:3]),
        ("Hugging Face", PEERS[3:]),
    ):
        parts.append(f"## From {title}\n")
        for peer in peers:
            parts.append(f"`{peer.program}` is `xlm-ds {peer.stage}`.\n")
            parts.append("| flag | | here |\n|---|---|---|")
            parts += [
                f"| {' '.join(f'`{flag}`' for flag in names)} | {verdict} | {why} |"
                for names, verdict, why in _grouped(peer.flags)
            ]
            parts.append("")
        parts.append("| file | here |\n|---|---|")
        parts += [
            f"| {name} | {here} |"
            for name, here in (line.split("|", 1) for line in _stripped(FILES[title]))
        ]
        parts.append("")
    return "\n".join(parts)


_HEAD = """# Coming from fairseq, XLM or Hugging Face

Written by `python -m xlm_ds.peer_flags` from the tables that the parser answers from; a test compares them.

- **same**: typed here as there.
- **changed**: another name, or another meaning. A name that is not ours is refused with the sentence.
- **ignored**: accepted, and answered with the sentence, as it decides nothing here.
- **refused**: with the sentence and exit code 2, as nothing here does it.

Underscores and hyphens in a flag's name are the same.

## What a run does differently

Commands of fairseq's example work with the program's name changed (`fairseq-preprocess` to `xlm-ds binarize`, `fairseq-train` to
`xlm-ds train`). What comes of them is not the same in everything:

| | fairseq's example | here |
|---|---|---|
| languages | one per batch, drawn uniformly | mixed within a batch, drawn with p ∝ n^0.7 as in the XLM paper (`--sampling-alpha 0` for uniform) |
| masks | the same in every epoch | new in every pass; validation's are fixed |
| gradient | mean of micro-batches' means | mean over all masked tokens of the batch |
| output bias | zeros | log of the unigram distribution (`--init-output-bias zeros` for theirs) |
| validation | a random language per batch, the tail dropped | every language in full, each with its own perplexity |
| `--stop-min-lr 1e-9` | never reached: torch skips changes below 1e-8 | reached |
| last batch | dropped if not a multiple of 8 | nothing is dropped |
| resuming | loses the schedule's counters | exact, also with another number of ranks or ZeRO stage; `xlm-ds prove RUN_A RUN_B` shows it |
| evaluation | "in progress" | `xlm-ds evaluate`: perplexity and accuracy beside the unigram level |

## Models

    xlm-ds convert checkpoint_best.pt OUT --to xlm_ds --dict data/dict.txt     # fairseq's
    xlm-ds convert mlm_xnli15_1024.pth OUT --to xlm_ds                         # XLM's
    xlm-ds convert xlm-roberta-base OUT --to xlm_ds --langs en,de              # a folder of Hugging Face's
    xlm-ds convert run OUT --to hugging-face                                   # or --to fairseq
    xlm-ds train DATA --init-from MODEL …                                      # any of them

What is written is read again, both models score the same rows (every position, every language, padding), and the largest
difference is said; above 1e-4 nothing is kept. Hugging Face's side is computed by transformers (`pip install
'xlm_ds[hf]'`); fairseq and XLM do not install any more, and their side is computed step by step from their own tensors,
which the tests compare with what fairseq and XLM themselves computed. From xlm_ds and back, weights are the same bit for
bit, but for rows of positions that nothing reads, which Hugging Face has no place for. Pickles are read in a process of their own
by a reader that can call nothing; it writes the tensors to TMPDIR for as long as it takes. A run of many ranks reads the
model on each of them: convert a pickle first.

A finetuned classifier is not converted. A text is tokenised and split already where the model came without codes (fairseq's
and XLM's .pth do): put `codes`, and `prepare.json` if there is one, beside the converted model. `--langs` names the languages
of a model that does not, by their ids; BERT and XLM-RoBERTa know none, so that all that are named have the row of its first
segment. Rows begin with eos here, and with another word in those two. A folder that is converted to xlm_ds and on to
Hugging Face has a tokenizer that looks pieces up, instead of its own.

    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer
    model, tokenizer = AutoModelForMaskedLM.from_pretrained("hf"), AutoTokenizer.from_pretrained("hf")
    batch = tokenizer(["Where is the <mask>?"], return_tensors="pt")
    languages = torch.full_like(batch.input_ids, model.config.lang2id["en"])
    model(**batch, token_type_ids=languages)        # BertForMaskedLM; langs=languages of XLMWithLMHeadModel

Without these ids BertForMaskedLM takes every text for the first language, and XLMWithLMHeadModel adds no language at all; so do
pipelines. XLMWithLMHeadModel has a feed-forward part of four times the width.

Hugging Face has no class for xlm_base without a norm on the embeddings: train with `--encoder-normalize-before` for
BertForMaskedLM, or `--arch xlm` for XLMWithLMHeadModel. Its XLMTokenizer takes every text for English when it is called
as usual (transformers 5.23.0 does not hand the language on); `convert` says how many texts get the ids they have here.

`--init-from` finds words by their symbols, languages by their names and positions by their numbers, in any dictionary;
what is new begins anew, what does not fit is left out, and both are said with counts. Where pieces are marked at the begin of a
word (SentencePiece, GPT-2's BPE), a word here is the piece with the mark. Rows of languages that the model does not name
begin anew. Width, feed-forward width and heads must be the model's. A run that is resumed keeps what it was begun with.
"""


def _stripped(table: str) -> list[str]:
    return [
        " | ".join(part.strip() for part in line.split("|")) for line in table.strip().splitlines()
    ]


def _grouped(flags: Sequence[PeerFlag]) -> Iterator[tuple[list[str], str, str]]:
    """Flags that have one verdict for one reason, together."""
    for (verdict, why), group in itertools.groupby(
        flags, key=lambda flag: (flag.verdict, flag.why)
    ):
        yield [flag.flag for flag in group], verdict, why


def main(argv: Sequence[str]) -> int:
    if argv:
        raise InputError("takes no arguments; it writes docs/coming-from.md to standard output")
    sys.stdout.write(document())
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_stage("peer_flags", main))
