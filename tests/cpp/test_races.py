"""Workers of the runtime under the thread sanitizer; `make races` runs a million plans."""

from tests.cpp.conftest import build, run


def test_random_plans_race_with_nothing() -> None:
    built = build("races", "quernstone_stress", "QS_SANITIZE=thread")
    output = run(built / "quernstone_stress", "4000", "7", TSAN_OPTIONS="halt_on_error=1")
    assert output == "4000 plans executed, 0 with wrong bits\n"
