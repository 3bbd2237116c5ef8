#!/usr/bin/env bash
# The first half hour on a GPU, in stages of under ten minutes each, without a network:
#   OUT=results bash benchmarks/first_gpu.sh STAGE      # 1 to 6, in the root of a checkout
# FOLDER (default .gpu) is from first_gpu_prep.sh. Each step has a limit of its own, and one that fails ends nothing. $OUT gets
# a JSON file of each measurement and stageN.log; how each step ended is printed.
#   1  tests, products one by one, Llama 3.1 8B LoRA in bf16, with an fp8 base, at its least memory
#   2  70B on nf4, 3B in full, a profile of 8B
#   3  a profile of 8B on fp8, first step cold and warm, 8B on int8
#   4  8B with one key changed at a time: each fast path; then, in steps of 80 examples, so that micro batches vary in length,
#      compile, packing and recomputation
#   5  the fast paths on fp8; Qwen3 8B and Mistral 7B beside Llama
#   6  the fast paths of 3B in full; 8B with plain code in place of a technique
# RECIPE=FILE measures that recipe in place of the true shapes, two steps each: whether every stage runs, on any machine.
set -u
stage=${1:?stage: 1 to 6} out=${OUT:?OUT: the folder for the results} folder=${FOLDER:-.gpu} limit=${LIMIT:-585} began=$SECONDS
python=${PYTHON:-python3} cache=${TMPDIR:-/tmp}/tunesmith-first-gpu log=$out/stage$stage.log
mkdir -p "$out" "$cache"
if [ -d "$folder/wheels" ]; then
  [ -d "$cache/site" ] || "$python" -m pip install -q --no-index --no-deps --no-compile --target "$cache/site" "$folder"/wheels/*.whl || exit 3
  export PYTHONPATH=$cache/site:$PWD/src
else
  export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 XDG_CACHE_HOME=$cache
for words in date nvidia-smi 'free -m' 'df -h'; do $words; done >>"$log" 2>&1 # some virtual machines get memory as they use it

step() { # seconds, name, command: what is left of the stage bounds it too
  local seconds=$1 name=$2 code
  shift 2
  [ $((SECONDS - began + seconds)) -gt "$limit" ] && seconds=$((limit - SECONDS + began))
  [ "$seconds" -lt 20 ] && { echo "skipped $name: no time is left in this stage" | tee -a "$log"; return 9; }
  echo "== $name: $*" >>"$log"
  timeout -k 10 "$seconds" "$@" >>"$log" 2>&1
  code=$?
  echo "$name ended with $code, $((SECONDS - began)) s into the stage" | tee -a "$log"
  return $code
}

words() { # of bench: SHAPE and what follows, or RECIPE
  local shape=$1
  shift
  if [ -n "${RECIPE:-}" ]; then
    given=("$RECIPE" "$@" --steps 2 --warmup 0)
  else
    given=(--shape "$shape" --tokenizer "$folder/tokenizer" --data "$folder/rows.json" "$@")
  fi
}

bench() { # seconds, name, shape, more words
  local seconds=$1 name=$2
  shift 2
  words "$@"
  step "$seconds" "$name" "$python" -m tunesmith bench --plain --json "$out/$name.json" "${given[@]}"
}

ablation() { # seconds, name, keys, shape, more words
  local seconds=$1 name=$2 keys=$3
  shift 3
  bench "$seconds" "$name" "$@" --ablation --only "$keys" --rounds 1 "${brief[@]}"
}

brief=(--steps 6 --warmup 3)
profile=(--steps 3 --warmup 3 --profile "$cache/traces" profile.wait=0 profile.warmup=1 profile.active=2)
micro=(benchmarks/micro.py "$out/micro.json")
[ -z "${RECIPE:-}" ] || micro+=(--tokens 512 --divide 16 --repeat 1)
keys=train.compile,data.pack,train.recompute
batch=(train.global_batch='80 examples')
full=(adapter.kind=none train.global_batch='65536 tokens') least=(train.recompute=full train.micro_batch='2048 tokens')
cut=() # of the shapes beside Llama
if [ -n "${RECIPE:-}" ]; then
  batch=()
  keys=data.pack,train.recompute # on a CPU nothing is compiled
  full=(adapter.kind=none) least=(train.recompute=full)
  cut=(--shapes mistral-7b --layers 1 train.global_batch='256 tokens' data.seq_len=256 --steps 1 --warmup 0)
fi
case $stage in
1)
  # Most of their time is compiling, on the host; each worker has two processes for that, not one for each core.
  TORCHINDUCTOR_COMPILE_THREADS=2 step 130 tests "$python" -m pytest -m gpu -n 6 -vv -rs -p no:cacheprovider --junitxml "$out/tests.xml"
  step 70 micro "$python" "${micro[@]}"
  bench 160 8b-bf16 llama3-8b || bench 110 8b-bf16-eager llama3-8b train.compile=off
  bench 140 8b-fp8 llama3-8b model.quantize=fp8
  bench 90 8b-least-memory llama3-8b "${least[@]}" "${brief[@]}"
  ;;
2)
  bench 260 70b-nf4 llama3-70b model.quantize=nf4 --steps 8 --warmup 3
  bench 180 3b-full llama3-3b "${full[@]}" --steps 10 --warmup 3
  bench 140 8b-profile llama3-8b "${profile[@]}"
  ;;
3)
  bench 150 8b-fp8-profile llama3-8b model.quantize=fp8 "${profile[@]}"
  bench 200 8b-cold llama3-8b --cold --steps 5
  bench 140 8b-int8 llama3-8b model.quantize=int8
  ;;
4)
  ablation 340 fast-paths train.fast_paths llama3-8b
  ablation 240 ablation "$keys" llama3-8b "${batch[@]}"
  ;;
5)
  ablation 280 fast-paths-fp8 train.fast_paths llama3-8b model.quantize=fp8
  step 300 shapes "$python" benchmarks/shapes.py --rounds 1 --json "$out/shapes.json" --tokenizer "$folder/tokenizer" \
    --data "$folder/rows.json" "${brief[@]}" "${cut[@]}"
  ;;
6)
  ablation 200 fast-paths-full train.fast_paths llama3-3b "${full[@]}"
  words llama3-8b "${brief[@]}"
  step 380 plain-code "$python" benchmarks/ablation.py --rounds 1 --json "$out/plain-code.json" "${given[@]}"
  ;;
*) echo "there is no stage $stage: 1 to 6" >&2; exit 2 ;;
esac
cp "$cache"/traces/top-*.txt "$out/" 2>/dev/null
exit 0
