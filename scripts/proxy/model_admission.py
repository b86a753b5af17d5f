"""Admission with several models (MODELS=router): which model a request is for, and its wait for that."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from urllib.parse import parse_qs

from accounting.request_record import RequestRecord
from auth import Caller
from backend.models import Models
from backend.readiness import READY
from backend.slots import SlotReclaimer
from core.errors import (
    BACKEND_TIMEOUT,
    LOADING,
    MODEL_NOT_FOUND,
    MODEL_REQUIRED,
    QUEUE_TIMEOUT,
    ROUTE_NOT_ALLOWED,
    GatewayError,
)
from policy.model_scheduler import Model, Visit
from policy.slot_demand import SlotDemand
from proxy.admission import Admission, Unfinished
from proxy.incoming_body import IncomingBody
from proxy.request_services import RequestServices
from proxy.response_info import ResponseInfo
from transport.backend_protocol import BackendProtocol
from transport.client_protocol import ClientProtocol
from transport.waiter import Waiter

_NOT_LOADED = b'"model is not loaded"'  # the router's answer for a model that has ended since the last look
# Its answer if the model's process died while it worked on the request, or just before. It is the whole payload: within
# an error of the model's such a text may be the client's own.
_CUT = re.compile(rb"(?:[0-9A-Fa-f]{1,8}\r\n)?proxy error: (Could not establish connection)?")
_MARKS_BYTES = 256  # of a payload: they stand at its beginning
_BAD_REQUEST, _FAILED = 400, 500
_LOADS = "autoload"  # in a query: the router would load a model itself, and end another one that is at work for it


class ModelAdmission(Admission):
    """The admission of one request for one of several models."""

    __slots__ = ("_body", "_model", "_models", "_visit", "_was_cut")

    def __init__(
        self,
        services: RequestServices,
        client: ClientProtocol,
        record: RequestRecord,
        caller: Caller,
        demand: SlotDemand,
        body: IncomingBody,
        models: Models,
    ) -> None:
        super().__init__(services, client, record, caller, demand)
        self._models = models
        self._body = body
        self._model: Model | None = None
        self._visit: Visit | None = None  # of a request that takes no slot
        self._was_cut = False

    def try_at_once(self) -> bool:
        """Return False: `wait` does all, and does not wait if the model is loaded."""
        if not self._record.queued_s:
            self._begin()
        self._leave()  # what it held, if the backend did not take it
        return False

    async def wait(self) -> bool:
        services, kind = self._services, self._route.kind
        if _LOADS in self._query():
            raise GatewayError(ROUTE_NOT_ALLOWED, "The gateway loads the models. Send the request without `autoload`.")
        if services.readiness.state != READY:
            if kind.slot:
                await self._until_ready()
            elif not await self._is_ready_by_now():
                return False
        named = self._named()
        if not self._route.by_model and named is None:
            return True
        model = self._model = self._models.find(self._choose(named))
        if kind.slot:
            await self._wait_for_slot(model)
        elif kind.bounded:
            await self._wait_without_slot(model)
        if kind.works:
            self._record.left_queue_s = services.clock()
        return True

    # --- The model ---

    def _named(self) -> str | None:
        """Return the model that the request names: in its body, or in the query of one that has none."""
        members = self._body.members
        if self._body.size:
            member = None if members is None else members.found.get("model")
            return member.value if member is not None and isinstance(member.value, str) else None
        return self._query().get("model", [None])[-1]

    def _query(self) -> Mapping[str, Sequence[str | None]]:
        query = self._record.prepared.target.partition(b"?")[2]
        return parse_qs(query.decode("latin-1"), keep_blank_values=True) if query else {}

    def _choose(self, named: str | None) -> str:
        """Return the model, and let the backend get its name if it would not know it.

        Raises MODEL_REQUIRED, MODEL_NOT_FOUND or MODEL_NOT_ALLOWED.
        """
        names = self._models.names
        name = names.resolve(named, self._caller.models)
        self._record.model = name
        if name != named and (not named or names.is_own_alias(named)):
            self._name_model(name, named)
        return name

    def _name_model(self, name: str, named: str | None) -> None:
        """Let the backend get the name of the model in place of an alias, or of none."""
        members, boundary = self._body.members, self._record.prepared.boundary
        if members is not None and members.end is not None:
            self._body.add("model", name)
        elif boundary and not named:
            self._body.add_field("model", name)
        elif boundary:
            raise GatewayError(MODEL_NOT_FOUND, f"A form must name the model itself, not an alias: {name}.")
        elif self._record.prepared.target.partition(b"?")[2]:
            raise GatewayError(MODEL_NOT_FOUND, f"A query must name the model itself, not an alias: {name}.")
        else:
            raise GatewayError(MODEL_REQUIRED)

    # --- The wait ---

    async def _wait_for_slot(self, model: Model) -> None:
        model.check()
        ticket = self._acquire_slots(model.queue)
        if ticket.waiting is not None:
            await self._wait_for(model, ticket.waiting)

    async def _wait_without_slot(self, model: Model) -> None:
        """Wait for the model, then for a place among the requests that take no slot."""
        visit = self._visit = model.visit()
        if visit.waiting is not None:
            await self._wait_for(model, visit.waiting)
        if self._waits_for_others():
            assert self._ticket is not None  # which it waits for
            assert self._ticket.waiting is not None
            self._begin_waiting()
            await self._client.wait_for(self._ticket.waiting, self._services.timeouts.queue_s, QUEUE_TIMEOUT)

    async def _wait_for(self, model: Model, waiting: "asyncio.Future[None]") -> None:
        """Wait for QUEUE_TIMEOUT, and if the model is not loaded for COLD_START_WAIT more; 0 is no limit."""
        self._begin_waiting()
        timeouts = self._services.timeouts
        limit_s = timeouts.queue_s
        if limit_s and not model.is_open:
            limit_s += timeouts.cold_start_s
        await self._client.wait_for(waiting, limit_s, QUEUE_TIMEOUT if model.is_open else LOADING)

    # --- The end ---

    async def is_missed(self, backend: BackendProtocol, info: ResponseInfo) -> bool:
        """Whether the request must be sent again, because the model had ended when it came, or while it worked on it.

        `info` is that of an error response.
        """
        model, kind = self._model, self._route.kind
        if model is None or not kind.works or info.status not in (_BAD_REQUEST, _FAILED):
            return False
        if info.framing.length != 0:
            await self._await_payload(backend)
        payload = backend.received[:_MARKS_BYTES]
        cut = _CUT.match(payload)
        if cut is not None:
            self._models.look_soon()
        was_cut = cut is not None and not self._was_cut and kind.repeatable
        if _NOT_LOADED not in payload and not (cut and cut[1]) and not was_cut:
            return False
        self._was_cut = self._was_cut or was_cut
        if was_cut:
            self._services.suspects.note_cut(model.name)
        self._models.note_ended(model)
        return True

    async def _await_payload(self, backend: BackendProtocol) -> None:
        """Wait for the first bytes of a response's payload, and leave them where they are."""
        if backend.received or backend.ended:
            return
        came: Waiter[None] = Waiter()

        def keep(data: bytes) -> None:
            backend.received += data
            came.set_result(None)

        backend.pass_to(keep, lambda cleanly: came.set_result(None))
        await self._client.wait(came, self._services.upstream_timeouts.request_s, BACKEND_TIMEOUT)

    def release(self) -> None:
        super().release()
        if self._visit is not None:
            self._visit.release()

    def release_unfinished(self, unfinished: Unfinished) -> None:
        super().release_unfinished(unfinished)
        if self._visit is not None:
            self._visit.release()
        self._models.look_soon()  # its model may have died

    def _leave(self) -> None:
        """Give back what it holds, to wait again."""
        for held in (self._ticket, self._visit):
            if held is not None:
                held.release()
        self._ticket = self._visit = None

    def _reclaimer(self) -> SlotReclaimer:
        assert self._model is not None  # its slot is held
        return self._models.reclaimer(self._model.name)
