"""The parser of the command line: the commands, and the options of each."""

import argparse
from collections.abc import Callable

import config
from cli.settings import HONOURED, MACHINE, TRAINING
from cli.values import amounts, classes, cuts, densities, names, seeds, widths

Add = Callable[..., object]  # a parser's `add_argument`


class Parser(argparse.ArgumentParser):
    """argparse that reports bad input in one sentence."""

    def error(self, message: str) -> None:
        self.exit(2, f"{message[0].upper()}{message[1:].rstrip('.')}; see {self.prog} --help.\n")


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="experiment.py", description="Domain generalization with importance-based weight masking.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, (text, add_options) in COMMANDS.items():
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        _shared_options(name, added.add_argument)
        add_options(added.add_argument)
    return parser


def _shared_options(command: str, add: Add) -> None:
    if command in TRAINING:
        if command != "confirm":  # where they are fixed
            counts = f"0 … N-1, or 100-199, or 0,3,7-9 (default {config.NUM_SEEDS})"
            add("--seeds", type=seeds, metavar="N", help=counts)
        add("--features", metavar="FILE", help="a feature file, in the format of data/README.md")
        where = f"default {config.RESULTS_DIR}; for the others than run a folder below it"
        add("--results-dir", metavar="DIR", help=where)
        add("--overwrite", action="store_true", help="delete the results that are there first")
        if command != "columns":
            add("--strict", action="store_true", help="stop at the first network that fails")
    if command in (*TRAINING, "features", "transfer"):
        where = "folder of domain folders of class folders of images, or of Parquet files"
        add("--data-root", metavar="DIR", help=where)
        add("--vit-model", metavar="ID_OR_DIR", help=f"default {config.VIT_MODEL}")
    if command in (*TRAINING, "features"):
        add("--verify", action="store_true", help="read all image files again, trust no time stamp")
    if command in (*TRAINING, "transfer"):
        add("--scheduler", metavar="ADDRESS", help="train on the Dask cluster of this scheduler, as tcp://HOST:8786")
    if {*MACHINE} <= {*HONOURED.get(command, MACHINE)}:
        add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
        add("--threads", type=int, metavar="N", help="CPU threads")
        setting = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
        add("--set", **setting, help="a setting of config.py that the command uses; may be repeated")


def _run(add: Add) -> None:
    add("--holdouts", type=names, metavar="A,B", help="domains to leave out (default: each)")
    add("--no-figures", action="store_true", help="write numbers only")
    steps = f"updates with TRAINED_BLOCKS=all (default {config.IMAGE_STEPS})"
    add("--steps", type=int, metavar="N", help=steps)


def _made_with(add: Add) -> None:
    add("--features", metavar="FILE", help="the feature file that the results were made with")
    add("--data-root", metavar="DIR", help="or the images")
    add("--vit-model", metavar="ID_OR_DIR", help="and their model")


def _study(add: Add) -> None:
    add("--sweep-seeds", type=seeds, metavar="N", help="of what is exploratory (default: 50 at most, of blocks 10)")
    add("--no-controls", action="store_true", help="of blocks: the arms of the confirmatory family alone")
    add("--keep-weights", action="store_true", help="of blocks: keep those of each arm at its chosen learning rate")


def _forms(add: Add) -> None:
    add("--widths", type=widths, metavar="10,32", help="units of each hidden layer (default 10,32,64,128)")
    add("--densities", type=densities, metavar="60,10", help="per cent of the weights marked (default 60,30,10)")
    add("--closer", action="store_true", help="the best two also in other scopes, and beside further controls")
    add("--starts", action="store_true", help="plain training and the own mask from every start, too")


def _confirm(add: Add) -> None:
    add("--place", required=True, metavar="NAME", help="where: one of evidence/confirmation.py")


def _compare(add: Add) -> None:
    add("--holdouts", type=names, metavar="A,B", help="domains to leave out (default: each)")
    add("--no-figures", action="store_true", help="write numbers only")
    add("--algorithms", type=names, metavar="A,B", help="names, or FILE.py:NAME of yours (default: all that are known)")
    add("--trials", type=int, default=1, metavar="N", help="hyperparameters tried per method (default 1)")
    add("--leave-one-out", action="store_true", help="train without every pair of domains as well")
    add("--rule", metavar="NAME", help="report by this selection rule alone (default: all that the runs allow)")


def _transfer(add: Add) -> None:
    add("--task", default="digits", metavar="NAME", help="what is pretrained and fine-tuned on what (default digits)")
    add("--data", metavar="DIR", help="where its images are, or of the task 'features' the feature file")
    add("--classes", type=classes, metavar="A,B:C,D", help="of the task 'images': pretrain on A and B, then C and D")
    add("--protocol", choices=("updates", "original"), default="updates", help="how to fine-tune (default updates)")
    add("--arms", dest="kinds", type=names, metavar="A,B", help="kinds of arms (default: as suits the task)")
    add("--cuts", type=cuts, metavar="0-6", help="numbers of layers that are kept, likewise")
    add("--amounts", type=amounts, metavar="0.1%,1%", help="shares of the training images, likewise")
    add("--repeats", type=seeds, metavar="N", help="0 … N-1, or 5-9, or 0,3 (default 20; of the original, its own)")
    add("--updates", type=int, metavar="N", help="of fine-tuning, for every amount of data, likewise")
    add("--channels", type=int, metavar="N", help="of each convolution; the original has 64")
    add("--probes", action="store_true", help="also measure what each layer of the pretrained networks holds")
    add("--pretrained", metavar="FILE", help="a network that all repeats start from, as the original saves them")
    add("--results-dir", metavar="DIR", help=f"default {config.RESULTS_DIR}/transfer/NAME")
    add("--overwrite", action="store_true", help="delete the results that are there first")
    add("--no-figures", action="store_true", help="write numbers only")


def _figures(add: Add) -> None:
    add("--results-dir", metavar="DIR", help=f"of run, study or compare (default {config.RESULTS_DIR})")
    add("--only", type=names, metavar="A,B", help="names of figures, or how they begin (default: all)")
    add("--format", choices=("png", "pdf", "svg"), default="png")
    add("--algorithms", type=names, metavar="A,B", help="FILE.py:NAME of each method of yours in a comparison")
    _made_with(add)


def _report(add: Add) -> None:
    where = f"what another command wrote (default {config.RESULTS_DIR})"
    add("directory", nargs="?", metavar="DIR", help=where)


def _features(add: Add) -> None:
    add("--output", metavar="FILE", help="copy the features there")


def _predict(add: Add) -> None:
    add("images", nargs="+", metavar="IMAGE", help="image files, and folders of images at any depth")
    add("--weights", required=True, metavar="FILE", help="of results/weights/, Phase 1 or 2")
    add("--vit-model", metavar="ID_OR_DIR", help="where the model lies (default: the name in the weights' header)")
    add("--seed", type=int, metavar="N", help="one network of the file (default: the mean over all seeds)")
    add("--output", metavar="FILE.csv", help="also write file, predicted class and all probabilities there")


def _export_domainbed(add: Add) -> None:
    add("directory", metavar="DIR", help="of the runs; what is there is kept")
    add("--results-dir", metavar="DIR", help=f"of compare or run (default {config.RESULTS_DIR}/compare)")
    add("--algorithms", type=names, metavar="A,B", help="these only: methods, FILE.py:NAME of yours; of a run, arms")
    _made_with(add)


def _import_domainbed(add: Add) -> None:
    add("directory", metavar="DIR", help="of DomainBed's runs")
    add("--dataset", metavar="NAME", help="where the runs are of several")
    add("--output", metavar="DIR", help="write the tables there as well: domainbed.txt, and CSV")


def _export_original(add: Add) -> None:
    add("directory", metavar="DIR", help="gets SET/results/cuts_CLASSES_SETTING.json and baselines_CLASSES.json")
    add("--results-dir", metavar="DIR", required=True, help="of transfer")
    add("--clusters", action="store_true", help="cluster what each layer gives as well: CLASSES_cluster.json")
    add("--data", metavar="DIR", help="where the images are, for --clusters")


def _import_original(add: Add) -> None:
    add("directory", metavar="DIR", help="with its files cuts_*.json, at any depth")
    add("--output", metavar="DIR", help="write the report and its tables there as well: report.txt, and CSV")


def _data(add: Add) -> None:
    add("name", nargs="?", metavar="NAME", help="of a known data set (default: list them)")
    where = "archives or folders, as it is distributed (default: the Hugging Face hub, where it is there)"
    add("--from", dest="sources", nargs="+", default=(), metavar="PATH", help=where)
    add("--output", metavar="DIR", help="write domain/class/file there; what is there is kept")
    add("--any-counts", action="store_true", help="accept other numbers of images than the known ones")


COMMANDS: dict[str, tuple[str, Callable[[Add], None]]] = {  # name -> help, and its own options
    "run": ("train both phases, write table, report and figures", _run),
    "study": ("arms and controls, sweeps and diagnostics: the whole answer", _study),
    "forms": ("which form of importance wins: criteria, densities and widths", _forms),
    "confirm": ("the forms that looked best, on data and features nobody tuned on", _confirm),
    "compare": ("the methods of the field on the same features, seeds and splits", _compare),
    "columns": ("importance of features: which columns of all layers carry over", lambda add: None),
    "transfer": ("how many layers of a small network carry over to new classes", _transfer),
    "figures": ("draw the figures of a results directory again, also as PDF or SVG", _figures),
    "report": ("write what a results directory holds as one page to look at", _report),
    "features": ("run the frozen backbone over a folder of images, nothing else", _features),
    "predict": ("class probabilities of images", _predict),
    "export-domainbed": ("write a comparison or a run as DomainBed does", _export_domainbed),
    "import-domainbed": ("tables of DomainBed's own runs, by its selection rules", _import_domainbed),
    "export-original": ("write transfer runs as tusharmanekar/mp-tl-study does", _export_original),
    "import-original": ("analyse the result files of tusharmanekar/mp-tl-study", _import_original),
    "data": ("get a known data set, or list them", _data),
    "docs": ("write the tables of docs/ and README.md from results/reference/", lambda add: None),
}
