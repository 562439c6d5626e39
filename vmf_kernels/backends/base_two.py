"""Factors between nats and base 2, in which softmax is formed: ``exp2`` costs a third of ``exp``."""

import math

LOG2_E = 1.4426950408889634
LN_2 = math.log(2.0)
