"""`measure`: what one training step of a model does to memory and time, without needing the memory that is missing."""

from recollect.measure.profiler import measure as measure
from recollect.measure.profiler import measure_step as measure_step
