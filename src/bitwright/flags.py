"""Flags of verbs that have many of them."""

from __future__ import annotations

import argparse

from bitwright import profile


def flag_recipe(parser: argparse.ArgumentParser) -> None:
    """Add what stands for a recipe."""
    flags = parser.add_argument_group("instead of a recipe")
    flags.add_argument("--model", metavar="NAME", help="a bundled network or package.module:function")
    flags.add_argument("--weights", metavar="FILE", help="its trained weights: .safetensors, .npz, .th, .pt or .pth")
    flags.add_argument("--data", metavar="NAME", help="a data set")
    flags.add_argument("--held-out", type=int, default=500, metavar="N", help="training images held out for selection (default: 500)")
    flags.add_argument("--budget", action="append", metavar="COST<=LIMIT", help="such as weight_bits<=2; may be repeated")
    flags.add_argument("--method", default="sdq", metavar="NAME", help="a search method (default: sdq); see `bitwright methods`")
    flags.add_argument("--weight-bits", type=int, nargs="+", metavar="W", help="candidates (default: the target's, or 1 to 8)")
    flags.add_argument("--activation-bits", type=int, nargs="+", metavar="A", help="candidates (default: the target's, or 32: float)")
    parser.set_defaults(method_options=())


def profile_flags(parser: argparse.ArgumentParser) -> None:
    """Add what `profile` takes."""
    parser.add_argument("--shape", metavar="CxHxW", help="input of --model where no data set is given, such as 3x224x224")
    parser.add_argument("--sensitivity", action="store_true", help="also measure what each choice adds to the loss, one site at a time")
    about = "by which method: kl (default), fisher, hawq or limpq; without a name and with --target: time networks on its runtime"
    parser.add_argument("--measure", metavar="NAME", nargs="?", const="latency", help=about)
    parser.add_argument(
        "--save", metavar="FILE", help="write what was measured to a file; a search takes it by the option table, or latency"
    )
    parser.add_argument("--judge", type=int, default=20, metavar="N", help="networks that predicted latencies are judged on (default: 20)")
    parser.add_argument("--check-additivity", action="store_true", help="also check on random policies whether they add up to the loss")
    parser.add_argument("--policies", type=int, metavar="N", help=f"how many policies are drawn (default: {profile.POLICIES}, or by size)")


def compare_flags(parser: argparse.ArgumentParser) -> None:
    """Add what `compare` takes."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, COMPARE_HELP
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="names, package.module:Class, or LABEL=NAME; uniform is added")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="each a split, a search and a training (default: 0 1 2)")
    parser.add_argument("--budget", nargs="+", metavar="COST<=LIMIT", help="each one a comparison; a comma joins limits kept at once")
    parser.add_argument("--out", metavar="DIR", help="the comparison's directory (default: runs/<recipe name>-compare)")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change a key of the recipe; may be repeated")


COMPARE_HELP = """\
A table, a CSV and report.html say which differences are significant (bootstrap over seeds and test images, Holm-corrected)
and whether mixed widths beat uniform. The same command goes on after a crash; started twice, the processes share the work.

  bitwright compare digits-sdq --methods sdq fisher uniform random --seeds 0 1 2
  bitwright compare my.yaml --methods sdq old=sdq --set compare.options.old.gate=interpolation
  bitwright compare my.yaml --budget 'bitops<=W4A4' 'bitops<=W3A3' --out runs/c
  bitwright compare my.yaml --set compare.short.epochs=1 --set compare.long.epochs=20

With compare.short and compare.long there are two stages: all methods with the short fine-tuning, then the compare.best
(default 5) on the selection images, and uniform, with the long one. Both are changes of the recipe's finetune section.
"""
