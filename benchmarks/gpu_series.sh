#!/usr/bin/env bash
# All GPU measurements of docs/performance.md, each with a time limit, logs and JSON under OUT.
#     OUT=results bash benchmarks/gpu_series.sh one|kernels|two|four
# one: tests, attention, the trainer on one GPU, the engine through the client; kernels: MXFP4 (with vLLM's full kernels for the
# engines); two: tests, publication, Wordle, synchronous against asynchronous; four: the trainer on 1, 2 and 4 GPUs. WORDLE holds
# further configurations and flags for the Wordle runs, for example `--model.name FOLDER`.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3} OUT=${OUT:-results} WORDLE=${WORDLE:-}
mkdir -p "$OUT"

step() {  # NAME SECONDS COMMAND...: run it, keep its log, show the end of it, go on whatever becomes of it
	local name=$1 limit=$2 begun=$SECONDS
	shift 2
	timeout --signal INT --kill-after 20 "$limit" "$@" >"$OUT/$name.log" 2>&1
	echo "=== $name: exit $? after $((SECONDS - begun)) s"
	tail -n "${LINES_SHOWN:-14}" "$OUT/$name.log"
}

trainer() {  # NAME SECONDS GPUS SETTINGS...
	local name=$1 limit=$2 gpus=$3
	shift 3
	# shellcheck disable=SC2086 -- GPUS is a list of numbers
	step "$name" "$limit" "$PYTHON" benchmarks/trainer_throughput.py --gpus $gpus --time-limit "$((limit - 5))" --json "$OUT/$name.json" "$@"
}

case ${1:-} in
one)
	step gpu_tests 150 "$PYTHON" -m pytest -q -m gpu tests/gpu
	step attention_kernels 40 "$PYTHON" benchmarks/attention_kernels.py --json "$OUT/attention_kernels.json"
	trainer trainer_plain 90 1 --steps 3 --warm-up 2
	trainer trainer_compiled 120 1 --steps 3 --warm-up 2 --set trainer.model.compile=true
	step engine_client 560 "$PYTHON" benchmarks/engine_client.py --lora both --waves 2 --time-limit 200 --json "$OUT/engine_client.json"
	;;
kernels)
	step mxfp4 200 "$PYTHON" benchmarks/mxfp4.py --json "$OUT/mxfp4.json"
	step mxfp4_crossover 90 "$PYTHON" benchmarks/mxfp4.py --measure-crossover
	for shape in qwen3-4b qwen3-8b; do
		for quant in "" 'trainer.model.quant.kind="mxfp4"'; do
			# shellcheck disable=SC2086 -- one setting or none
			trainer "trainer_${shape}_${quant:+mxfp4}" 80 1 --shape $shape --packs 1x16384 --micro-batches 1 --steps 3 --warm-up 2 \
				--set trainer.model.gradient_checkpointing=true $quant
		done
	done
	step engine_weights 560 "$PYTHON" benchmarks/engine_client.py --lora off --weights bfloat16 mxfp4 --waves 2 --time-limit 200 \
		--json "$OUT/engine_weights.json"
	;;
two)
	step gpu_tests 200 "$PYTHON" -m pytest -q -m gpu tests/gpu/test_broadcast_cuda.py tests/gpu/test_trainer_cuda.py
	step publication 420 "$PYTHON" benchmarks/publication.py --time-limit 200 --vllm enforce-eager=true --json "$OUT/publication.json"
	# shellcheck disable=SC2086
	step wordle 560 "$PYTHON" -m turnwise.cli.rl @ configs/wordle/two_gpus.toml $WORDLE --output-dir "$OUT/wordle" --plain
	step sync_async 400 "$PYTHON" benchmarks/sync_async.py @ configs/wordle/two_gpus.toml --steps 40 --staleness 0 2 --time-limit 190 \
		--json "$OUT/sync_async.json" --set $WORDLE
	;;
four)
	trainer trainer_4b 280 "1 2 4" --steps 4 --warm-up 2 --set trainer.model.compile=true
	trainer trainer_8b 150 1 --shape qwen3-8b --steps 2 --warm-up 1 --set trainer.model.compile=true trainer.model.gradient_checkpointing=true
	;;
*)
	sed -n '2,6p' "$0" >&2
	exit 2
	;;
esac
