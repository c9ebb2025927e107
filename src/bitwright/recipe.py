"""Recipes: one YAML file says the whole job; an unknown key is an error that names the nearest known one."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from bitwright.data.quality import Mix, parse_conditions, shares_of
from bitwright.errors import RecipeError, nearest
from bitwright.exporters import get as exporter
from bitwright.methods import available, get_method
from bitwright.quant import QuantOptions
from bitwright.quant.corrections import Step
from bitwright.robustness import Goal
from bitwright.targets import check_format
from bitwright.training import FinetuneOptions
from bitwright.typed import typed

T = TypeVar("T")
Options = dict[str, Any]


def _pin(value: object) -> object:
    """Check the bits of a pinned end; a union's own message would name its branches instead of the key."""
    if value is None or value == "free":
        return value
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(width, int) for width in value):
        return tuple(value)
    raise ValueError("expected [weight width, activation width], 'free', or nothing for the default")


Pin = Annotated[tuple[int, int] | Literal["free"] | None, BeforeValidator(_pin)]


class Section(BaseModel):
    """A part of a recipe: frozen, and every key must be known."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=())


class QualitySection(Section):
    """Images of mixed quality: which corruptions and severities, how often, and which are held out for the test.

    Corruptions and severities are a list, all equally often, or a mapping to how often each comes.
    """

    corruptions: dict[str, float] | None = None
    severities: dict[int, float] | None = None
    clean: float = 0.25
    held_out: list[str] | None = None

    @field_validator("corruptions", "severities", mode="before")
    @classmethod
    def _equally_often(cls, value: object, known: ValidationInfo) -> object:
        return shares_of(str(known.field_name), value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _makes_a_mix(self) -> QualitySection:
        self.mix()
        return self

    def mix(self) -> Mix:
        """Return the mix; raises `DataError` for one that cannot be.

        >>> QualitySection(corruptions=["fog"], severities=[2], clean=0.5).mix().corruptions
        {'fog': 1.0}
        """
        given = {name: value for name, value in self.model_dump().items() if value is not None}
        if self.held_out is not None:
            given["held_out"] = tuple(self.held_out)
        return Mix(**given)


class DataSection(Section):
    """Which data, how many training images are held out for selection and how many others used (all by default), and in what quality."""

    name: str
    held_out: int = Field(ge=1)
    images: int | None = Field(default=None, ge=1)
    options: Options = Field(default_factory=dict)
    quality: QualitySection | None = None


class ModelSection(Section):
    """Which network: a bundled name or ``package.module:function``, its arguments, and trained weights."""

    name: str
    arguments: Options = Field(default_factory=dict)
    weights: str | None = None


class TeacherSection(Section):
    """Who teaches in fine-tuning; the name ``float`` is the unquantized network itself."""

    name: str = "float"
    arguments: Options = Field(default_factory=dict)
    weights: str | None = None


class ProxySection(Section):
    """Another, smaller data set to search on: which, how many of its training images, and how the network is adapted to it."""

    name: str
    images: int | None = Field(default=None, ge=2)
    options: Options = Field(default_factory=dict)
    adapt: Options | None = Field(default_factory=lambda: {"epochs": 5, "lr": 0.02})


class SearchSection(Section):
    """Which method looks for the policy, what it may choose from and what it may spend."""

    method: str = "sdq"
    options: Options = Field(default_factory=dict)
    budgets: list[str] = Field(min_length=1)
    weights: list[int] = Field(default_factory=lambda: list(range(1, 9)), min_length=1)
    activations: list[int] = Field(default_factory=lambda: [32], min_length=1)
    pin_first: Pin = None
    pin_last: Pin = None
    skip: list[str] = Field(default_factory=list)
    tie: list[list[str]] = Field(default_factory=list)
    steps: int | None = Field(default=None, ge=1)
    seconds: float | None = Field(default=None, gt=0)
    stop_at: str | None = None
    save_every: int = Field(default=50, ge=1)
    never_worse: bool = False
    proxy: ProxySection | None = None

    @field_validator("proxy", mode="before")
    @classmethod
    def _named_proxy(cls, value: object) -> object:
        """Read ``cifar100`` and ``cifar100:2000`` as a proxy's name and number of images."""
        if not isinstance(value, str):
            return value
        name, _, images = value.partition(":")
        return {"name": name, "images": images or None}

    @field_validator("budgets", mode="before")
    @classmethod
    def _one_budget(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


@dataclasses.dataclass(frozen=True)
class QuantizeOptions(QuantOptions):
    """How a policy becomes a network before it is fine-tuned.

    Attributes:
        calibration: training images that step sizes and BatchNorm statistics are taken from.
        correct: corrections after quantization, see `bitwright.quant.corrections`.
    """

    calibration: int = 512
    correct: tuple[Step, ...] = ()


class BaselinesSection(Section):
    """Which policies of the same budget stand beside the found one, and the fine-tuning that all of them get."""

    methods: list[str] = Field(default_factory=lambda: ["uniform", "random"])
    random: int = Field(default=3, ge=1)
    finetune: Options | None = None


class CompareSection(Section):
    """What `bitwright compare` sets side by side, and the fine-tuning that all of it gets.

    Attributes:
        methods: names or ``package.module:Class``; ``label=name`` gives one a name of its own, so that it may come twice.
            By default the recipe's own with ``fisher``, ``uniform`` and ``random``; ``uniform`` is always among them.
        seeds: each is a split of the data, a search and a training; by default the recipe's and the two after it.
        budgets: each a comparison of its own (a list inside is kept all at once); by default the recipe's, all at once.
        options: of the methods, by name or label; the recipe's own method has ``search.options`` beneath them.
        short: changes of ``finetune`` for a first stage, in which every method takes part.
        long: changes of ``finetune`` for the stage of the ``best`` and of ``uniform``; the only stage without ``short``.
        best: how many go on to the second of two stages, by accuracy on the selection images.
    """

    methods: list[str] | None = Field(default=None, min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    budgets: list[str | list[str]] | None = Field(default=None, min_length=1)
    options: dict[str, Options] = Field(default_factory=dict)
    short: Options | None = None
    long: Options | None = None
    best: int = Field(default=5, ge=1)

    @field_validator("methods", "seeds", "budgets")
    @classmethod
    def _once(cls, value: list[Any] | None) -> list[Any] | None:
        twice = next((item for k, item in enumerate(value or ()) if item in (value or ())[:k]), None)
        if twice is not None:
            raise ValueError(f"'{twice}' is given twice; give each once")
        return value

    def named(self, default: Sequence[str]) -> dict[str, str]:
        """Return the methods by label, ``uniform`` among them.

        >>> CompareSection(methods=["sdq", "mixed=sdq"]).named(())
        {'sdq': 'sdq', 'mixed': 'sdq', 'uniform': 'uniform'}
        """
        pairs = [text.partition("=") for text in self.methods or default]
        return {**{label: name if equals else label for label, equals, name in pairs}, "uniform": "uniform"}


class EvaluateSection(Section):
    """Under which conditions both networks are evaluated besides the test images as they are, and with which draws.

    Without this section, a recipe with ``data.quality`` has ``clean``, ``mixed`` and, where it holds corruptions out, ``held_out``.
    """

    conditions: list[str] = Field(default_factory=list)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default_factory=lambda: [0], min_length=1)

    @field_validator("conditions", mode="before")
    @classmethod
    def _in_one_text(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value


class ExportSection(Section):
    """Where the result goes."""

    to: str = "packed"
    options: Options = Field(default_factory=dict)


class Recipe(Section):
    """Everything that decides a run's result; `load_recipe` makes one."""

    name: str
    description: str = ""
    seed: int = Field(default=0, ge=0)
    threads: int | None = Field(default=None, ge=1)
    data: DataSection
    model: ModelSection
    float_training: Options | None = Field(default=None, alias="float")
    search: SearchSection
    quantize: Options = Field(default_factory=dict)
    finetune: Options | None = None
    adaptive: Options | None = None
    teacher: TeacherSection | None = None
    baselines: BaselinesSection | None = None
    compare: CompareSection | None = None
    evaluate: EvaluateSection | None = None
    target: str | None = None
    latency: str | None = None
    export: ExportSection | None = None
    report: bool = True

    @field_validator("teacher", mode="before")
    @classmethod
    def _named_teacher(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain JSON-able data, defaults filled in; `load_recipe` accepts it again."""
        data = self.model_dump(mode="json", by_alias=True)
        if data["data"]["quality"] is None:  # what a recipe does not have leaves no trace: runs begun before it was there go on
            del data["data"]["quality"]
        if self.search.stop_at is None:
            del data["search"]["stop_at"]
        return {
            key: value
            for key, value in data.items()
            if value is not None or key not in ("compare", "evaluate", "target", "latency", "adaptive")
        }

    def to_yaml(self) -> str:
        """Return the recipe as YAML text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, except that a key given twice is an error: the first value would be lost silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise RecipeError(f"recipe: key '{key}' is given twice (line {node.start_mark.line + 1}); keep one")
        return super().construct_mapping(node, deep)


def bundled_recipes() -> tuple[str, ...]:
    """Return the names of the recipes that come with the package.

    >>> "digits-sdq" in bundled_recipes()
    True
    """
    folder = resources.files("bitwright") / "recipes"
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe: a bundled name, a path to a YAML file, or data already read.

    Args:
        source: ``"digits-sdq"``, ``"my.yaml"`` or a mapping.
        overrides: ``"a.b.c=value"`` texts, applied in order before checking; the value is YAML.

    Raises:
        RecipeError: one line that names the key, where it is and the nearest known key.

    >>> load_recipe("digits-sdq", ["search.budgets=weight_bits<=2.25"]).search.budgets
    ['weight_bits<=2.25']
    """
    data = dict(source) if isinstance(source, Mapping) else _read(str(source))
    if isinstance(data.get("teacher"), str):
        data["teacher"] = {"name": data["teacher"]}  # so that --set teacher.weights=… finds a section
    for text in overrides:
        data = override(data, text)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_explain(error)) from None
    _check_options(recipe)
    return recipe


def override(data: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Return a copy of ``data`` with one ``a.b.c=value`` applied; ``value`` is parsed as YAML.

    >>> override({"search": {"steps": 5}}, "search.steps=7")
    {'search': {'steps': 7}}
    """
    path, equals, value = text.partition("=")
    if not equals or not all(part.strip() for part in path.split(".")):
        raise RecipeError(f"--set {text}: expected key=value, for example --set search.steps=200")
    return _put(dict(data), [part.strip() for part in path.split(".")], parse_yaml(value, f"--set {path}"), path)


def _put(data: dict[str, Any], path: list[str], value: object, whole: str) -> dict[str, Any]:
    head, *rest = path
    if not rest:
        return {**data, head: value}
    inner = data.get(head) or {}
    if not isinstance(inner, Mapping):
        raise RecipeError(f"--set {whole}: '{head}' is {inner!r}, not a section; set the whole of it: --set {head}='{{name: …}}'")
    return {**data, head: _put(dict(inner), rest, value, whole)}


def _read(source: str) -> dict[str, Any]:
    bundled = resources.files("bitwright") / "recipes" / f"{source}.yaml"
    if source in bundled_recipes():
        return _mapping(bundled.read_text("utf-8"), f"recipe {source}")
    path = Path(source)
    if not path.is_file():
        raise RecipeError(f"recipe '{source}': no bundled recipe and no file of that name; {nearest(source, bundled_recipes())}")
    try:
        return _mapping(path.read_text("utf-8"), f"recipe {source}")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe '{source}': cannot be read as text ({error}); give a YAML file") from None


def _mapping(text: str, where: str) -> dict[str, Any]:
    data = parse_yaml(text, where)
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: found {type(data).__name__}, expected sections such as 'data:' and 'model:'")
    return data


def parse_yaml(text: str, where: str) -> Any:
    """Return what a YAML text says; raises `RecipeError` for what is no YAML, or says a key twice.

    >>> parse_yaml("[1, off]", "example")
    [1, False]
    """
    loader = _UniqueKeyLoader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None
    finally:
        loader.dispose()


def _explain(error: ValidationError) -> str:
    """Turn pydantic's first complaint into one line: the key, its place, what to type instead."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"recipe: unknown key '{place}'; {nearest(str(first['loc'][-1]), _known_keys(first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"recipe: key '{place}' is missing; add it, or give it with --set {place}=…"
    expected = first["msg"].replace("Input should be", "expected").removeprefix("Value error, ")
    return f"recipe: {place} is {_short(first['input'])}; {expected}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _known_keys(loc: Iterable[int | str]) -> list[str]:
    """Return the keys of the section at ``loc``."""
    section: type[BaseModel] = Recipe
    for part in loc:
        fields = {field.alias or name: field for name, field in section.model_fields.items()}
        annotation = fields[str(part)].annotation
        section = next(c for c in (annotation, *get_args(annotation)) if isinstance(c, type) and issubclass(c, BaseModel))
    return [field.alias or name for name, field in section.model_fields.items()]


def _check_options(recipe: Recipe) -> None:
    """Check the free sections against the dataclasses that will receive them, before anything runs."""
    make_options(get_method(recipe.search.method), recipe.search.options, "search.options")
    if recipe.search.stop_at is not None:
        _check_stop_at(recipe.search.method, recipe.search.stop_at)
    options = make_options(QuantizeOptions, recipe.quantize, "quantize")
    check_format(recipe.target, None if recipe.export is None else recipe.export.to, options.points, integer=options.integer)
    if recipe.evaluate is not None and recipe.evaluate.conditions:
        parse_conditions(recipe.evaluate.conditions)
    adapt = None if recipe.search.proxy is None else recipe.search.proxy.adapt
    for place, section in (("float", recipe.float_training), ("finetune", recipe.finetune), ("search.proxy.adapt", adapt)):
        if section is not None:
            make_options(FinetuneOptions, section, place)
    if recipe.adaptive is not None:
        from bitwright.adaptive.files import check_recipe  # noqa: PLC0415  (it needs recipes)

        check_recipe(recipe)
    elif recipe.export is not None:
        make_options(exporter(recipe.export.to), recipe.export.options, "export.options")
    if recipe.baselines is not None:
        for name in recipe.baselines.methods:
            get_method(name)
        make_options(FinetuneOptions, recipe.baselines.finetune or {}, "baselines.finetune")
    if recipe.compare is not None:
        _check_compare(recipe, recipe.compare)


def _check_stop_at(method: str, text: str) -> None:
    """Check the accuracy at which a search stops, and that its method finds policies that can be judged by themselves."""
    Goal.parse(text)
    if get_method(method).ranking == "last":
        why = f"'{method}' trains the weights while it searches, so no policy before its last can be judged by itself"
        raise RecipeError(f"recipe: search.stop_at: {why}; give search.steps or search.seconds, or stop_at to finetune")


def _check_compare(recipe: Recipe, section: CompareSection) -> None:
    """Check the methods of a comparison, their options and both fine-tunings."""
    labels = [text.partition("=")[0] for text in section.methods or ()]
    for text, label in zip(section.methods or (), labels, strict=True):
        if not label or labels.count(label) > 1 or text.startswith("uniform="):
            raise RecipeError(f"recipe: compare.methods has '{text}'; give NAME or LABEL=NAME, each label once, and none called uniform")
    named = section.named(())
    for label, name in named.items():
        make_options(get_method(name), section.options.get(label, {}), f"compare.options.{label}")
    for label, options in section.options.items():
        if label not in named:
            make_options(_known_method(label, named), options, f"compare.options.{label}")
    for place, changes in (("short", section.short), ("long", section.long)):
        if changes is not None:
            make_options(FinetuneOptions, {**(recipe.finetune or {}), **changes}, f"compare.{place}")


def _known_method(label: str, named: Mapping[str, str]) -> type[Any]:
    """Return the method that options are for though it is not compared this time; a label that nobody has is an error."""
    try:
        return get_method(label)
    except RecipeError:
        hint = nearest(label, dict.fromkeys([*named, *available()]))
        what = f"recipe: compare.options.{label} is for no method and no label of compare.methods"
        raise RecipeError(f"{what}; {hint}, or name it there as {label}=METHOD") from None


def make_options(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build a dataclass of options from recipe values: unknown names and wrong types are errors.

    >>> from bitwright.driver import Stop
    >>> make_options(Stop, {"steps": 3}, "stop")
    Stop(steps=3, seconds=None)
    """
    if not dataclasses.is_dataclass(cls):
        raise RecipeError(f"{where}: {cls.__name__} is no dataclass of options; write it with @dataclass(frozen=True)")
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    hints = get_type_hints(cls)
    checked: Options = {}
    for name, value in values.items():
        if name not in known:
            raise RecipeError(f"recipe: unknown key '{where}.{name}'; {nearest(name, known)}")
        checked[name] = _checked(hints[name], value, f"{where}.{name}")
    try:
        return cls(**checked)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"recipe: {where}: {error}") from None


def _checked(hint: Any, value: object, place: str) -> Any:
    try:
        return typed(hint, value)
    except ValueError as error:
        raise RecipeError(f"recipe: {place} is {_short(value)}; {error}") from None
