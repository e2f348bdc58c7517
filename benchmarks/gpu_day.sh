#!/usr/bin/env bash
# The day there is a GPU: everything worth knowing, in order of value, each step within ten minutes.
#
#     OUT=results WHEELS=wheels benchmarks/gpu_day.sh [STEP ...]
#
# Run at the root of a checkout. Each step writes its log into $OUT, and there is a line per step in $OUT/summary.txt as
# soon as it ends; one that ended well is not run again, so that a second call goes on where the first one stopped.
# A step that fails or takes too long takes no other along. Names of steps choose some of them, in the order given.
#
#   OUT      where everything goes (gpu_day)
#   WHEELS   wheels of what the machine lacks, made beforehand with
#              pip wheel --wheel-dir wheels '.[train]' pytest pytest-xdist hypothesis
#            they are installed, without a network and without touching torch, Triton and transformers that are there,
#            into an environment in $OUT; without WHEELS the Python that is active is used as it is
#   PYTHON   the Python to begin with (python3)
#   LIMIT    seconds of a step (600)
#   SLEEPIFY_GPU_DAY=tiny   the same on the CPU with models a thousand times smaller: shows that it runs, nothing else
set -uo pipefail

cd "$(dirname "$0")/.." || exit 1
OUT=$(mkdir -p "${OUT:-gpu_day}" && cd "${OUT:-gpu_day}" && pwd) || exit 1
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-600}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

TINY=()
GPU=(--output "$OUT/gpu.md" --kept "$OUT/gpu.cells.json" --seconds $((LIMIT * 8 / 10)))
FULL=()
RULE110=rule110_t32.yaml
# 40 million tokens in texts of 100.
RULE110_ARGUMENTS=(--max_steps 780 --warmup_steps 50 --save_strategy no --logging_steps 20 --test_examples 2000)
MARK=gpu
if [ "${SLEEPIFY_GPU_DAY:-}" = tiny ]; then
    TINY=(--device cpu --tiny)
    GPU+=("${TINY[@]}" --repeats 1 --batches 1 2)
    FULL=("${TINY[@]}" --tokens 24 --window_size 8 --n_loops 2)
    RULE110=rule110_tiny.yaml
    RULE110_ARGUMENTS=(--save_strategy no)
    MARK='not slow and not gpu'
    export OMP_NUM_THREADS=1
fi

if [ -n "${WHEELS:-}" ]; then
    if [ ! -e "$OUT/venv/ready" ]; then
        "$PYTHON" -m venv --system-site-packages "$OUT/venv" &&
            "$OUT/venv/bin/python" -m pip install -qq --no-index --find-links "$WHEELS" \
                sleepify accelerate peft datasets pyyaml rich matplotlib pytest pytest-xdist hypothesis &&
            touch "$OUT/venv/ready" || exit 1
    fi
    PYTHON=$OUT/venv/bin/python
fi

ORDER=(doctor tests full_size training decoding operations jet memory rule110_n1 rule110_n4)

run() {
    case $1 in
        doctor)
            { nvidia-smi || true; } && "$PYTHON" -m pip list --disable-pip-version-check && "$PYTHON" -m sleepify doctor
            ;;
        tests) if [ "$MARK" = gpu ]; then make test-gpu PYTHON="$PYTHON" ARGS="-p no:randomly --maxfail 30 --durations 10"; else
            "$PYTHON" -m pytest -m "$MARK" tests/test_device.py -k "convolution or ragged"; fi ;;
        full_size) "$PYTHON" -m benchmarks.full_size ${FULL[@]+"${FULL[@]}"} ;;
        training) "$PYTHON" -m benchmarks.gpu "${GPU[@]}" --parts train ;;
        decoding) "$PYTHON" -m benchmarks.gpu "${GPU[@]}" --parts wake ;;
        operations) "$PYTHON" -m benchmarks.gpu "${GPU[@]}" --parts operations ;;
        jet) "$PYTHON" -m benchmarks.gpu "${GPU[@]}" --parts jet ;;
        memory) "$PYTHON" -m benchmarks.gpu "${GPU[@]}" --parts memory ;;
        rule110_n[0-9])
            "$PYTHON" -m sleepify train "recipes/configs/$RULE110" --n_loops "${1#rule110_n}" \
                --output_dir "$OUT/$1" "${RULE110_ARGUMENTS[@]}"
            ;;
        *) echo "expected one of: ${ORDER[*]}; got $1" >&2 && return 2 ;;
    esac
}

# Called again for one step, under `timeout`, which can end only a program.
if [ "${1:-}" = --only ]; then
    run "$2"
    exit
fi

failed=0
for step in "${@:-${ORDER[@]}}"; do
    if [ -e "$OUT/$step.done" ]; then
        echo "$step: done before"
        continue
    fi
    echo "$step ..."
    begin=$SECONDS
    OUT=$OUT WHEELS='' PYTHON=$PYTHON LIMIT=$LIMIT timeout -k 20 "$LIMIT" bash "$0" --only "$step" >"$OUT/$step.log" 2>&1
    code=$?
    case $code in
        0) said="done" && touch "$OUT/$step.done" ;;
        124 | 137) said="stopped after $LIMIT s" && failed=1 ;;
        *) said="failed with $code" && failed=1 ;;
    esac
    echo "$(date -u +%H:%M:%S) $step: $said, $((SECONDS - begin)) s" | tee -a "$OUT/summary.txt"
done
exit $failed
