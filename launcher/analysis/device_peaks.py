"""The peak arithmetic throughput of GPUs, as their makers publish it.

The figures are for dense matrix products with fp32 accumulation and without sparsity, in 10^12
operations per second. They come from the data sheets of NVIDIA and AMD: V100 (2020), T4 (2019),
A100 (2021), A10 (2021), A30 (2021), A40 (2022), RTX A6000 (2021), L4, L40 and L40S (2023), H100,
H200 and H20 (2024), B200, GB200 and B300 (2025), GeForce RTX 3090 (GA102, 2021), 4090 (Ada, 2023)
and 5090 (Blackwell, 2025), MI250X (2022), MI300X (2023).
"""

from __future__ import annotations

_TERA = {
    # name: (fp32, tf32, bf16, fp16); None where the device has no units for the format
    "H100 PCIe": (51, 378, 756, 756),
    "H100 NVL": (60, 418, 835, 835),
    "H100": (67, 494, 989, 989),
    "H200": (67, 494, 989, 989),
    "GH200": (67, 494, 989, 989),
    "H20": (44, 74, 148, 148),
    "B200": (75, 1100, 2250, 2250),
    "GB200": (80, 1250, 2500, 2500),
    "B300": (75, 1100, 2250, 2250),
    "GB300": (80, 1250, 2500, 2500),
    "A100": (19.5, 156, 312, 312),
    "A10G": (31.2, 35, 70, 70),
    "A10": (31.2, 62.5, 125, 125),
    "A30": (10.3, 82, 165, 165),
    "A40": (37.4, 74.8, 149.7, 149.7),
    "RTX A6000": (38.7, 77.4, 154.8, 154.8),
    "L40": (90.5, 90.5, 181, 181),
    "L40S": (91.6, 183, 362, 362),
    "L4": (30.3, 60, 121, 121),
    "V100": (15.7, None, None, 125),
    "V100 PCIE": (14, None, None, 112),
    "T4": (8.1, None, None, 65),
    "RTX 3090": (35.6, 35.6, 71, 71),
    "RTX 4090": (82.6, 82.6, 165.2, 165.2),
    "RTX 5090": (104.8, 104.8, 209.5, 209.5),
    "MI300X": (163.4, 653.7, 1307.4, 1307.4),
    "MI250X": (47.9, None, 191.5, 191.5),
}
"""Peaks by a part of the driver's device name; where several match, the longest one applies."""


def peak_flops(device_name: str, precision: str, *, tf32: bool) -> float | None:
    """Return the peak throughput of a device in a precision, or None if it is unknown.

    Args:
        device_name: Name that the driver reports, such as `NVIDIA H100 80GB HBM3`.
        precision: fp32, bf16 or fp16.
        tf32: Whether fp32 matrix products use TF32.

    Returns:
        Floating-point operations per second.
    """
    words = device_name.replace("-", " ")
    matches = [name for name in _TERA if f" {name} " in f" {words} "]
    columns = {"fp32": 1 if tf32 else 0, "bf16": 2, "fp16": 3}
    if not matches or precision not in columns:
        return None
    tera = _TERA[max(matches, key=len)][columns[precision]]
    return None if tera is None else tera * 1e12
