"""Part "environment" of the GPU check: the device, its copy bandwidth and its GEMM rate."""

import torch

from bench.gpu.job import Job, milliseconds


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Returns the bytes per second of a copy within device memory, counting bytes read and
    written."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e3 * num_bytes / milliseconds(lambda: target.copy_(source), device, 5)


def gemm_rate(device: torch.device, size: int) -> float:
    """Returns the FLOP/s of a size^3 product. The values are random, because zeros draw less
    power."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2e3 * size**3 / milliseconds(lambda: torch.mm(a, b, out=out), device, 10)


def run(job: Job) -> str:
    on_gpu = job.device.type == "cuda"
    print(job.environment, flush=True)
    num_bytes, size = 2**24, 512
    if on_gpu:
        free, total = torch.cuda.mem_get_info(job.device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(job.device)))
        job.save(free_bytes=free, total_bytes=total, compute_capability=capability)
        if free < 0.9 * total:
            print(f"only {free / 2**30:.0f} of {total / 2**30:.0f} GiB of device memory are free")
        num_bytes, size = min(2**32, free // 4), 8192
    bandwidth = copy_bandwidth(job.device, num_bytes)
    job.save(copy_bytes_per_s=bandwidth)
    rate = gemm_rate(job.device, size)
    job.save(gemm_flop_per_s=rate)
    versions = job.environment["versions"]
    named = ("driver", "torch", "triton", "transformers", "peft")
    listed = ", ".join(f"{name} {versions.get(name) or 'unknown'}" for name in named)
    return (
        f"{job.environment['device']}; {listed}; copies {bandwidth / 1e12:.3g} TB/s, "
        f"GEMM {rate / 1e12:.3g} TFLOP/s"
    )
