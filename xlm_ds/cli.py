"""`xlm-ds STAGE …`: finds the stage's module and hands it the rest of the command line."""

import runpy
import sys

from xlm_ds import __version__
from xlm_ds.log import EXIT_BAD_INPUT, EXIT_OK

STAGES = {
    "prepare": "raw text -> tokenised and BPE'd splits, codes, vocabulary",
    "binarize": "splits -> .bin/.idx pairs and dict.txt",
    "shards": "looks into, checks, joins, divides and converts .bin/.idx pairs",
    "plan": "a configuration -> memory, speed and hours of its training",
    "preflight": "the hosts of a run -> what would make it fail there",
    "train": "binarized data -> checkpoints",
    "finetune": "a checkpoint and labelled texts -> a classifier, tested in every language",
    "supervise": "starts a failed run again from its last checkpoint",
    "evaluate": "a checkpoint -> perplexity and accuracy per language",
    "convert": "a model of fairseq, XLM or Hugging Face to one of ours, or ours to theirs",
    "retrieve": "a checkpoint and aligned texts -> how often translations find each other",
    "fill": "a checkpoint and a text with <mask> -> the best words there",
    "prove": "two runs -> identical to an update, or their first difference",
    "report": "a run's metrics -> a picture of its curves",
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.stdout.write(_usage())
        return EXIT_OK
    if sys.argv[1] == "--version":
        sys.stdout.write(f"xlm_ds {__version__}\n")
        return EXIT_OK
    stage = sys.argv.pop(1)
    if stage not in STAGES:
        sys.stderr.write(f"xlm-ds: error: unknown stage {stage}; there are {', '.join(STAGES)}\n")
        return EXIT_BAD_INPUT
    # Exits with the stage's code. alter_sys: prepare's worker processes look for its functions in __main__.
    runpy.run_module(f"xlm_ds.{stage}", run_name="__main__", alter_sys=True)
    return EXIT_OK


def _usage() -> str:
    lines = [f"  {stage:10} {what}" for stage, what in STAGES.items()]
    return "\n".join(["usage: xlm-ds STAGE … (xlm-ds STAGE --help for its flags)", *lines, ""])
