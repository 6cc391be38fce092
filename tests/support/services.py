import os

import pytest


def require_service(name: str, found: object) -> None:
    """Go on if *found* is true; else skip the test, or fail it where POOL_REQUIRE_SERVICES=1 (CI) says that *name* has to be there."""
    if found:
        return
    if os.environ.get("POOL_REQUIRE_SERVICES") == "1":
        pytest.fail(f"{name} is missing, and POOL_REQUIRE_SERVICES=1")
    pytest.skip(f"{name} is missing")
