"""``pytest benchmarks``: which cases, and who runs them."""

from benchmarks import cases, peers


def pytest_addoption(parser):
    group = parser.getgroup("fastnn")
    group.addoption(
        "--cases", choices=("quick", "default", "full"), default="quick", help="which cases (default: quick)"
    )
    group.addoption(
        "--peers",
        default="eager",
        help="rivals beside fastnn, by commas: " + ",".join(p.name for p in peers.select_peers()[1:]),
    )


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    chosen = cases.all_cases()
    size = metafunc.config.getoption("--cases")
    if size == "quick":
        chosen = [c for c in chosen if cases.is_quick(c)]
    elif size == "default":
        chosen = [c for c in chosen if cases.is_usual(c)]
    contenders = peers.select_peers(metafunc.config.getoption("--peers").split(","))
    pairs = [(c, p) for c in chosen for p in contenders]
    metafunc.parametrize(
        ("case", "peer"), pairs, ids=[f"{c.id.replace(' ', '_')}-{p.name}" for c, p in pairs]
    )
