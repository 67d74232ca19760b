"""Where Python adds its part to the ops that the native library defines."""

import torch

LIBRARY = torch.library.Library("fastnn", "FRAGMENT")
