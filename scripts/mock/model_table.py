"""The models of the mock as a router: which there are, what each is doing, and when one gives way to another.

As in llama-server b11434: a model with running requests is never unloaded for another, unless it is told to.
"""

import asyncio
import configparser
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from mock.request_bodies import ApiError, bad_request
from mock.templates import Json

UNLOADED, LOADING, LOADED = "unloaded", "loading", "loaded"
TRUE = ("on", "enabled", "true", "1")


@dataclass(eq=False)
class MockModel:
    """One model. `options` are those of its preset; `exit_code` is that of its last end, None before one."""

    name: str
    source: str  # models_dir, or preset
    options: Mapping[str, str]
    status: str = UNLOADED
    exit_code: int | None = None
    last_used_s: float = 0.0
    requests: "set[asyncio.Task[None]]" = field(default_factory=set)
    load: "asyncio.Task[None] | None" = None

    @property
    def aliases(self) -> list[str]:
        return [alias.strip() for alias in self.options.get("alias", "").split(",") if alias.strip()]

    @property
    def failed(self) -> bool:
        return self.status == UNLOADED and bool(self.exit_code)

    def describe(self) -> Json:
        """Return its row in GET /models."""
        arguments = [part for name, value in self.options.items() for part in (f"--{name}", value)]
        ini = "".join(f"{name} = {value}\n" for name, value in self.options.items())
        failure = {"exit_code": self.exit_code, "failed": True} if self.failed else {}
        about = {"value": self.status, "args": ["mock_backend.py", *arguments], "preset": f"[{self.name}]\n{ini}"}
        return {
            "id": self.name,
            "aliases": self.aliases,
            "tags": [],
            "object": "model",
            "owned_by": "llamacpp",
            "created": int(time.time()),
            "status": {**about, **failure},
            "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
            "source": self.source,
            "can_remove": False,
            **({"meta": {"n_ctx": 16384, "n_ctx_train": 32768}} if self.status == LOADED else {}),
        }


class ModelTable:
    """All models by name, and their loads. `max_loaded` 0: no limit; `load_s` is how long a load takes."""

    def __init__(self, models: Mapping[str, MockModel], max_loaded: int, load_s: float) -> None:
        self.models = models
        self._max_loaded = max_loaded
        self._load_s = load_s
        self._changed = asyncio.Event()
        self._listeners: set[asyncio.Queue[Json]] = set()

    def find(self, name: str) -> MockModel | None:
        """Return the model with this name or alias."""
        aliased = (model for model in self.models.values() if name in model.aliases)
        return self.models.get(name) or next(aliased, None)

    def load_at_start(self) -> None:
        """Begin to load the models whose presets say so."""
        for model in self.models.values():
            if model.options.get("load-on-startup", "").lower() in TRUE:
                self._start(model)

    def load(self, name: str) -> None:
        """Begin to load a model, in place of an idle one if there are as many as may be. Raises ApiError."""
        model = self.find(name)
        if model is None:
            raise ApiError(404, "not_found_error", "model is not found")
        if model.status != UNLOADED:
            raise bad_request("model is already running")
        if not self._free_place():
            raise ApiError(500, "server_error", "model limit reached, try again later")
        self._start(model)

    def unload(self, name: str) -> None:
        """End a model, and its running requests. Raises ApiError."""
        model = self.find(name)
        if model is None:
            raise bad_request("model is not found")
        if model.status == UNLOADED:
            raise bad_request("model is not running")
        self._end(model, 0 if model.status == LOADED else 1)

    async def require(self, name: str, *, autoload: bool) -> MockModel:
        """Return a model that can serve; with `autoload` it is loaded first. Raises ApiError."""
        if not name:
            raise bad_request("model name is missing from the request")
        model = self.find(name)
        if model is None:
            raise bad_request(f"model '{name}' not found")
        if not autoload and model.status == UNLOADED:
            raise bad_request("model is not loaded")
        loads = 0
        while autoload and model.status != LOADED:
            if loads and model.failed:
                raise ApiError(500, "server_error", f"model name={model.name} failed to load")
            if model.status == UNLOADED and self._free_place():
                self._start(model)
                loads += 1
            await self._changed.wait()
        return model

    @contextmanager
    def in_use(self, model: MockModel) -> Iterator[None]:
        """Count the current task as a request of the model, which ends with it."""
        task = asyncio.current_task()
        assert task
        model.requests.add(task)
        model.last_used_s = time.monotonic()
        try:
            yield
        finally:
            model.requests.discard(task)
            self._notify()

    @contextmanager
    def events(self) -> "Iterator[asyncio.Queue[Json]]":
        """Yield a queue of all changes from now on, as GET /models/sse tells them."""
        queue: asyncio.Queue[Json] = asyncio.Queue()
        self._listeners.add(queue)
        try:
            yield queue
        finally:
            self._listeners.discard(queue)

    def _free_place(self) -> bool:
        """Unload the idle model that was used least recently, if one more may not be loaded; return whether one may."""
        running = [model for model in self.models.values() if model.status != UNLOADED]
        if self._max_loaded and len(running) >= self._max_loaded:
            idle = [model for model in running if model.status == LOADED and not model.requests]
            if not idle:
                return False
            self._end(min(idle, key=lambda model: model.last_used_s), 0)
        return True

    def _start(self, model: MockModel) -> None:
        model.status, model.last_used_s = LOADING, time.monotonic()
        self._notify({"model": model.name, "event": "model_status", "data": {"status": LOADING}})
        model.load = asyncio.ensure_future(self._finish_load(model))

    async def _finish_load(self, model: MockModel) -> None:
        await asyncio.sleep(self._load_s)
        if _is_broken(Path(model.options.get("model", ""))):
            self._set(model, UNLOADED, 1)
        else:
            self._set(model, LOADED)

    def _end(self, model: MockModel, exit_code: int) -> None:
        if model.load:
            model.load.cancel()
        for request in list(model.requests):
            request.cancel()
        self._set(model, UNLOADED, exit_code)

    def _set(self, model: MockModel, status: str, exit_code: int | None = None) -> None:
        model.status, model.exit_code = status, exit_code
        more = {} if exit_code is None else {"exit_code": exit_code}
        self._notify({"model": model.name, "event": "status_change", "data": {"status": status, **more}})

    def _notify(self, event: Json = None) -> None:
        for queue in self._listeners if event else ():
            queue.put_nowait(event)
        self._changed.set()
        self._changed = asyncio.Event()


def _is_broken(path: Path) -> bool:
    """Return whether a file exists that is no model."""
    with suppress(OSError), path.open("rb") as file:
        return file.read(4) != b"GGUF"
    return False


def find_models(folder: str, preset: str) -> dict[str, MockModel]:
    """Return the models of a folder and of a preset by name; either may be "". Raises OSError or ValueError."""
    models = {name: MockModel(name, "models_dir", {"model": str(path)}) for name, path in _models_in(folder)}
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), default_section="*")
    if preset:
        with open(preset, encoding="utf-8") as file:
            try:
                parser.read_file(file)
            except configparser.Error as error:
                raise ValueError(f"failed to parse server config file: {preset} ({error})") from None
    for name in parser.sections():
        known = models[name].options if name in models else {}
        models[name] = MockModel(name, "preset", {**known, **parser[name]})
    return models


def _models_in(folder: str) -> Iterator[tuple[str, Path]]:
    for path in sorted(Path(folder).iterdir()) if folder else ():
        files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
        models = [file for file in files if file.suffix == ".gguf" and "mmproj" not in file.name]
        if models:
            yield path.name.replace(".gguf", ""), models[0]
