"""The download program's decisions that need no hub: what to fetch, and what a failure means."""

import errno

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from app.stores.hub_download import kind_of
from app.stores.hub_files import DamagedError, wanted
from tests.unit.stores.weight_cases import FILE_SIZES, UNNEEDED_SIZES


def test_only_what_a_model_needs_is_wanted() -> None:
    names = {"../config.json", "/config.json", "vae/decoder.pth", "vae/decoder.safetensors"}
    assert wanted(names) == {"vae/decoder.safetensors"}
    assert wanted({"pytorch_model.bin", "NOTICE.md", "a.gguf"}) == {
        "pytorch_model.bin",
        "NOTICE.md",
    }
    assert wanted(FILE_SIZES | UNNEEDED_SIZES) == set(FILE_SIZES)


def refused(status: int, **headers: str) -> HfHubHTTPError:
    request = httpx2.Request("GET", "https://hub.invalid")
    response = httpx2.Response(status, headers=headers, request=request)
    return HfHubHTTPError("refused", response=response)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DamagedError(), "integrity"),
        (HFValidationError(), "not-found"),
        (refused(401, **{"X-Error-Message": "Invalid credentials"}), "forbidden"),
        (refused(404, **{"X-Error-Code": "Whatever"}), "not-found"),
        (refused(403), "unreachable"),  # a proxy's own refusal
        (refused(404), "unreachable"),
        (refused(429, **{"X-Error-Message": "slow down"}), "unreachable"),
        (httpx2.ReadError("reset"), "unreachable"),
        (httpx2.ProxyError("407"), "unreachable"),
        (OfflineModeIsEnabled(), "unreachable"),
        (ValueError("not JSON"), "unreachable"),
        (OSError(errno.ENOSPC, "full"), "no-space"),
        (PermissionError(errno.EACCES, "no"), "unwritable"),
        (KeyError("sha"), "other"),
    ],
    ids=repr,
)
def test_every_failure_has_a_kind(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind
