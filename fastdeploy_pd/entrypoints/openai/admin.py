"""/v1/admin/role and /v1/admin/drain: what an operator does to one running instance. Who may call them is the guard's business."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.cluster.messages import MAX_DRAIN_S, RoleName, Standing
from fastdeploy_pd.engine.admin import InstanceAdmin
from fastdeploy_pd.engine.roles import Role
from fastdeploy_pd.entrypoints.openai.limits import BODY_TIMEOUT_S, MAX_BODY_BYTES
from fastdeploy_pd.entrypoints.openai.stream import read_body
from fastdeploy_pd.entrypoints.openai.validation import parse_body

DRAIN_S = 30.0


class RoleBody(BaseModel):
    """What POST /v1/admin/role takes."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: RoleName
    force: bool = False  #: also where nobody is left to do what the instance did


class DrainBody(BaseModel):
    """What POST /v1/admin/drain takes."""

    model_config = ConfigDict(extra="forbid", strict=True)
    timeout_s: Annotated[float, Field(ge=0, le=MAX_DRAIN_S)] = DRAIN_S


Body = TypeVar("Body", RoleBody, DrainBody)


def role_view(instance_id: str, standing: Standing) -> dict[str, Any]:
    """Returns: the answer of /v1/admin/role: what is left is of a role that the instance no longer has."""
    role = Role(standing.role)
    return {
        "instance_id": instance_id,
        "role": standing.role,
        "since_unix_s": WallClock().unix_s() - standing.role_age_s,
        "left_of_old_role": {
            "requests": 0 if role.can_decode else standing.num_requests,
            "prefill_orders": 0 if role.can_prefill else standing.num_orders,
        },
    }


def drain_view(instance_id: str, standing: Standing) -> dict[str, Any]:
    """Returns: the answer of /v1/admin/drain."""
    return {
        "instance_id": instance_id,
        "is_draining": standing.drain_left_s is not None,
        "timeout_s": standing.drain_left_s,  # what is left of it
        "left": {"requests": standing.num_requests, "prefill_orders": standing.num_orders},
    }


def add_admin(app: FastAPI, admin: InstanceAdmin, responses: dict[int | str, dict[str, Any]]) -> None:
    """Add the endpoints.

    Args:
        responses: what is said of errors in the OpenAPI document.
    """

    def schema(kind: type[BaseModel]) -> dict[str, Any]:
        return {"requestBody": {"content": {"application/json": {"schema": kind.model_json_schema()}}}}

    async def body(kind: type[Body], request: Request) -> Body:
        return parse_body(kind, await read_body(request.receive, MAX_BODY_BYTES, BODY_TIMEOUT_S) or b"{}")

    @app.get("/v1/admin/role", responses=responses)
    async def role() -> dict[str, Any]:
        return role_view(admin.own.instance_id, await admin.standing())

    @app.post("/v1/admin/role", responses=responses, openapi_extra=schema(RoleBody))
    async def set_role(request: Request) -> dict[str, Any]:
        given = await body(RoleBody, request)
        return role_view(admin.own.instance_id, await admin.set_role(given.role, given.force))

    @app.get("/v1/admin/drain", responses=responses)
    async def drain_progress() -> dict[str, Any]:
        return drain_view(admin.own.instance_id, await admin.standing())

    @app.post("/v1/admin/drain", responses=responses, openapi_extra=schema(DrainBody))
    async def drain(request: Request) -> dict[str, Any]:
        given = await body(DrainBody, request)
        return drain_view(admin.own.instance_id, await admin.drain(given.timeout_s))
