"""Frequency steps as a what-if: compute-bound time · f0/f, memory-bound time unchanged, dynamic power · (f/f0)^a."""

from __future__ import annotations

from muxtune.spec.cluster import DeviceSpec
from muxtune.spec.errors import InputError
from muxtune.spec.noun import noun

#: Chosen, not measured. CMOS dynamic power is C·V²·f: exponent 1 with voltage held, 3 with voltage in proportion to f. A GPU's
#: voltage has a floor, and its memory does not follow the core clock, so a value between the two is assumed.
DYNAMIC_EXPONENT = 2.0


@noun
class FrequencyStep:
    """A core clock, against the one at which the device's peaks (or the measured profile) hold: its first step."""

    mhz: int
    reference_mhz: int
    exponent: float = DYNAMIC_EXPONENT

    @property
    def ratio(self) -> float:
        """f / f0."""
        return self.mhz / self.reference_mhz

    @property
    def power_scale(self) -> float:
        """Dynamic power at this step over that at the reference; idle power does not change."""
        return float(self.ratio**self.exponent)

    def time_scale(self, compute: float, memory: float) -> float:
        """Time of an operator at this step over that at the reference.

        `compute` and `memory` are its times at the reference if only the one or the other bound it (any unit).
        """
        bound = max(compute, memory)
        return max(compute / self.ratio, memory) / bound if bound > 0 else 1.0

    @property
    def statement(self) -> str:
        """What was assumed, in a sentence."""
        return (
            f"what-if, f0 = {self.reference_mhz} MHz: compute-bound time x f0/f, other times as they are; "
            f"dynamic power x (f/f0)^{self.exponent:g} (assumed, not measured)"
        )


def frequency_step(device: DeviceSpec, mhz: int) -> FrequencyStep:
    """A step of the device.

    Raises:
        InputError: the device has no such step.
    """
    if mhz not in device.frequency_mhz:
        steps = ", ".join(str(f) for f in device.frequency_mhz)
        raise InputError(f"frequency {mhz} MHz: {device.name} has the steps {steps} MHz; name one of them")
    return FrequencyStep(mhz=mhz, reference_mhz=device.frequency_mhz[0])
