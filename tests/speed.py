"""Record of a link's speed for tests."""

from __future__ import annotations

from workflow_scripts.handover.speed import Speed, SpeedTest

SPEED = Speed(
    engine="llama.cpp",
    device="cpu",
    machine="x86_64, 2 CPUs",
    n_threads=2,
    prompt_tokens=512,
    generated_tokens=16,
    n_repetitions=3,
    prompt_milliseconds_per_token=0.1234,
    prompt_standard_deviation_milliseconds_per_token=0.0056,
    decode_milliseconds_per_token=2.5,
    decode_standard_deviation_milliseconds_per_token=None,
    first_token_milliseconds=63.2,
    first_token_standard_deviation_milliseconds=2.9,
    tests=(
        SpeedTest(
            test="pp512",
            depth_tokens=0,
            tokens_per_second=8103.7,
            standard_deviation_tokens_per_second=12.5,
        ),
    ),
    size_bytes=5 * 2**20,
    peak_memory_bytes=3 * 2**30,
)
