"""How often a phase is called in simulated runs with known truth; as a script it prints the table of the README."""

from __future__ import annotations

from mui_callback.metrics.phases import Phase
from test_phases import called, decided

REPETITIONS = 4000
WINDOWS = (5, 8)
UNCHANGED = {
    "one of the two does not change": ((0.0, 0.2), {}),
    "neither changes": ((0.0, 0.0), {}),
    "one does not change, and training noise lasts (autocorrelation 0.5)": ((0.0, 0.2), {"autocorrelation": 0.5}),
    "the same, with no noise of samples": ((0.0, 0.2), {"autocorrelation": 0.5, "response": 1e-9}),
}


def main() -> None:
    """Print the rates."""
    for seed, (truth, (slopes, noise)) in enumerate(UNCHANGED.items(), start=10):
        rates = [decided(called(seed, slopes, REPETITIONS, window, **noise)) for window in WINDOWS]
        print(f"| {truth} |", *(f"{100 * rate:.1f} % |" for rate in rates), flush=True)
    found = [called(20, (0.06, -0.06), REPETITIONS, window) for window in WINDOWS]
    right = [phases.count(Phase.EVOLVING) for phases in found]
    wrong = [len(phases) - phases.count(Phase.UNDECIDED) - n for phases, n in zip(found, right, strict=True)]
    rates = (f"{100 * n / REPETITIONS:.1f} %, {bad} wrong |" for n, bad in zip(right, wrong, strict=True))
    print("| both change, from probe to probe by three times the noise of training |", *rates)


if __name__ == "__main__":
    main()
