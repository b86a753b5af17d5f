"""Which models a router would serve: those of MODELS_DIR and MODELS_PRESET, found and checked before the start.

Names and files are found as llama-server b11434 finds them. What it serves once it runs, it says itself (GET /models).
Like boot.model_files this runs in a process of its own, since a volume may block for any time.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from boot.llama_server import CACHE_SETTINGS, models_folder
from boot.model_errors import ModelError
from boot.model_files import MAX_LISTED_NAMES, examine
from boot.preset_file import TRUE, parse_preset
from config.settings import Config

_DRAFTS = ("mtp-", "dspark-", "dflash-")
_FIRST_PART = "-00001-of-"


@dataclass(frozen=True)
class RouterModel:
    """One model. `path` is its (first) file, None if llama-server downloads it; `beside` are its projector and draft.

    `at_start`: its preset has it loaded when llama-server starts.
    """

    name: str
    setting: str
    path: Path | None = None
    beside: tuple[Path, ...] = ()
    aliases: tuple[str, ...] = ()
    at_start: bool = False
    size_bytes: int = 0


@dataclass(frozen=True)
class RouterModels:
    """All models with the sizes of their files, and warnings about those that cannot be loaded."""

    models: tuple[RouterModel, ...]
    warnings: tuple[str, ...]

    def largest_bytes(self, count: int) -> int:
        """Return the size of the largest models that may be loaded at once."""
        return sum(sorted((model.size_bytes for model in self.models), reverse=True)[:count])


def find_models(config: Config, environ: Mapping[str, str]) -> RouterModels:
    """Find and check all models. Raises ModelError, with everything that is wrong; `environ` may name a cache."""
    folder, preset = models_folder(config), config.router.preset
    found = list(_models_in(folder)) if folder else []
    counts = Counter(model.name for model in found)
    problems = [f"MODELS_DIR: two files are named {name}" for name, count in counts.items() if count > 1]
    models = {model.name: model for model in found}
    if preset:
        models |= _of_preset(preset, models)
    checked = [_with_size(model) for model in models.values()]
    problems += [reason for model, reason in checked if reason and model.setting == "MODELS_PRESET"]
    warnings = [reason for model, reason in checked if reason and model.setting == "MODELS_DIR"]
    models = {model.name: model for model, _ in checked}
    problems += _clashes(list(models.values()))
    known = {*models, *(alias for model in models.values() for alias in model.aliases)}
    if not models and not _has_cache(config, environ):
        raise ModelError("; ".join(problems) or _nothing_found(folder, preset))
    problems += _unknown_names(config, known)
    problems += _too_many_at_start(config, list(models.values()))
    if problems:
        raise ModelError("; ".join(problems))
    return RouterModels(tuple(models.values()), tuple(warnings))


def _models_in(folder: Path) -> Iterator[RouterModel]:
    """Yield a model for each GGUF file and for each sub-folder that has one."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise ModelError(f"MODELS_DIR: {folder} cannot be read: {error.strerror}") from None
    for path in paths:
        if path.is_dir():
            yield from _model_of_folder(path)
        elif path.is_file() and path.suffix == ".gguf" and not _is_companion(path.name):
            yield RouterModel(path.name.replace(".gguf", ""), "MODELS_DIR", path)


def _model_of_folder(folder: Path) -> Iterator[RouterModel]:
    try:
        files = [path for path in sorted(folder.iterdir()) if path.suffix == ".gguf" and path.is_file()]
    except OSError:
        return
    beside = tuple(path for path in files if _is_companion(path.name))
    models = [path for path in files if path not in beside]
    first = [path for path in models if _FIRST_PART in path.name]
    if models:
        yield RouterModel(folder.name, "MODELS_DIR", (first or models)[-1], beside)


def _is_companion(name: str) -> bool:
    return "mmproj" in name or name.startswith(_DRAFTS)


def _of_preset(preset: Path, in_folder: Mapping[str, RouterModel]) -> dict[str, RouterModel]:
    try:
        sections = parse_preset(preset.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"MODELS_PRESET: {preset} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"MODELS_PRESET: {preset}: {error}") from None
    return {name: _of_section(name, options, in_folder.get(name)) for name, options in sections.items()}


def _of_section(name: str, options: Mapping[str, str], in_folder: RouterModel | None) -> RouterModel:
    path = Path(options["model"]) if "model" in options else in_folder.path if in_folder else None
    beside = tuple(Path(options[option]) for option in ("mmproj", "draft") if option in options)
    aliases = tuple(alias.strip() for alias in options.get("alias", "").split(",") if alias.strip())
    at_start = options.get("load-on-startup", "").lower() in TRUE
    downloads = "hf" in options or "url" in options or "/" in name  # a name with / is that of a cached model
    if path is None and not downloads:
        raise ModelError(f"MODELS_PRESET: [{name}] names no model: it needs model, hf or model-url")
    setting = "MODELS_DIR" if in_folder and path == in_folder.path and not beside else "MODELS_PRESET"
    return RouterModel(name, setting, None if "url" in options else path, beside, aliases, at_start)


def _with_size(model: RouterModel) -> tuple[RouterModel, str]:
    """Return the model with the size of all its files, and why it cannot be loaded, or ""."""
    files = [model.path] if model.path else []
    try:
        size_bytes = sum(examine(path, path.parent).size_bytes for path in (*files, *model.beside))
    except ModelError as error:
        return model, f"{model.setting}: the model {model.name}: {error}"
    return replace(model, size_bytes=size_bytes), ""


def _clashes(models: Sequence[RouterModel]) -> Iterator[str]:
    """Complain about aliases of presets that are other models' names or aliases, with which llama-server ends."""
    owners = {model.name: model.name for model in models}
    for model in models:
        for alias in model.aliases:
            if owners.setdefault(alias, model.name) != model.name:
                yield f"MODELS_PRESET: {alias} is a name of {owners[alias]} and of {model.name}"


def _has_cache(config: Config, environ: Mapping[str, str]) -> bool:
    """Return whether llama-server may find models that it has downloaded before."""
    named = any(environ.get(name) for name in CACHE_SETTINGS)
    return named or any(config.model.dir.glob("models--*"))


def _nothing_found(folder: Path | None, preset: Path | None) -> str:
    if preset:
        return f"MODELS_PRESET: {preset} has no [section] of a model{f', and {folder} no .gguf file' if folder else ''}"
    return f"MODELS_DIR: there is no model in {folder}: it needs .gguf files, or folders with them"


def _unknown_names(config: Config, known: "set[str]") -> Iterator[str]:
    """Complain about names in settings that no model has. One with / may be that of a cached model."""
    router = config.router
    given = [("MODELS_PRELOAD", router.aliases.get(name, name)) for name in router.preload]
    if router.default_model:
        given.append(("DEFAULT_MODEL", router.aliases.get(router.default_model, router.default_model)))
    given += [("MODEL_ALIASES", name) for name in dict.fromkeys(router.aliases.values())]
    listed = ", ".join(sorted(known)[:MAX_LISTED_NAMES]) + (", …" if len(known) > MAX_LISTED_NAMES else "")
    for setting, name in given:
        if name not in known and "/" not in name:
            yield f"{setting}: there is no model {name} (there are {listed})"
    for alias in router.aliases:
        if alias in known:
            yield f"MODEL_ALIASES: {alias} is the name of a model itself"


def _too_many_at_start(config: Config, models: Sequence[RouterModel]) -> Iterator[str]:
    names = {model.name for model in models if model.at_start}
    names |= {config.router.aliases.get(name, name) for name in config.router.preload}
    if len(names) > config.router.max_loaded:
        listed = ", ".join(sorted(names))
        yield f"MODELS_MAX={config.router.max_loaded}, but more models are to be loaded at the start: {listed}"
