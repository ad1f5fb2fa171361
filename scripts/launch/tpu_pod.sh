#!/usr/bin/env bash
# One run on all hosts of a Cloud TPU pod: asks for it (queued resources), waits, installs, runs, resumes after
# preemption on a new pod, and deletes the pod in the end.
#
#   PROJECT=my-project ZONE=us-west4-a NFS=10.0.0.2:/share scripts/launch/tpu_pod.sh my.yaml runs/first
#   scripts/launch/tpu_pod.sh delete          # what is left after Ctrl-C
#
# Edit, or set in the environment: TYPE and RUNTIME (a pair; `gcloud compute tpus versions list` shows runtimes),
# SPOT= for a pod that is not preempted and costs more, NFS, the address of a Filestore instance in the network of
# the pod. The run's folder lies there (/mnt/shared/runs/first), and so do compiled programs; put data sets there too.
#
# Needs gcloud, signed in, a quota for TYPE, and this repository as REPOSITORY, which the pod can clone.
#
# Tried: `bash -n`, shellcheck, and its course (a preemption among it) with a stand-in for gcloud
# (tests/scripts/test_launch.py). Not tried: a pod.
set -euo pipefail

NAME=${NAME:-fedjax-sim}
TYPE=${TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
SPOT=${SPOT---spot}
REPOSITORY=${REPOSITORY:-https://github.com/OWNER/fedjax_sim}
STARTS=${STARTS:-20} # how many pods at most, one after another
POLL=${POLL:-30}     # seconds between two looks
MOUNT=/mnt/shared
: "${PROJECT:?the project that pays}" "${ZONE:?where the pod is, such as us-west4-a}"

tpus() { gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"; }
state() { tpus queued-resources describe "$NAME" --format='value(state.state)' 2>/dev/null || echo NONE; }
on_all() { tpus tpu-vm ssh "$NAME" --worker=all --command="$1"; }
delete() { tpus queued-resources delete "$NAME" --force --quiet; }

if [[ ${1-} == delete ]]; then
  delete
  exit
fi
config=${1:?the YAML file of the run, as the clone of the repository has it}
out=$MOUNT/${2:?the folder of the run, below the shared one}
: "${NFS:?HOST:/SHARE of a file system that all hosts mount}"

create() {
  # shellcheck disable=SC2086 # SPOT is one word or none
  tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" \
    --runtime-version="$RUNTIME" $SPOT
}

await() {
  while :; do
    case $(state) in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED | NONE) return 1 ;;
    esac
    sleep "$POLL"
  done
}

# The images have Python 3.10; uv brings a newer one.
setup="set -e
sudo mkdir -p $MOUNT
mountpoint -q $MOUNT || { sudo apt-get install -qy nfs-common && sudo mount -t nfs $NFS $MOUNT; }
command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -d fedjax_sim ] || git clone -q $REPOSITORY fedjax_sim
cd fedjax_sim
[ -d .venv ] || { ~/.local/bin/uv venv -q --python 3.12 && ~/.local/bin/uv pip install -q '.[tpu]'; }"

# Every host chooses between the two by the same file: config.yaml comes only after all have joined.
run="cd fedjax_sim
export JAX_COMPILATION_CACHE_DIR=$MOUNT/compiled
if [ -f $out/config.yaml ]; then
  exec .venv/bin/fedjax-sim resume $out --join auto
fi
exec .venv/bin/fedjax-sim run $config --output.dir $out --join auto"

trap 'echo "the pod is still there; remove it: PROJECT=$PROJECT ZONE=$ZONE NAME=$NAME $0 delete" >&2; exit 130' INT TERM
for ((start = 1; start <= STARTS; start++)); do
  echo "pod $start of at most $STARTS: asked for ($TYPE in $ZONE)"
  create
  if await && on_all "$setup"; then
    status=0
    on_all "$run" || status=$?
    if ((status == 0)); then
      delete
      echo "finished: $NFS, $out"
      exit 0
    fi
    # Preemption is seen some time after the connection broke.
    sleep "$POLL"
    if [[ $(state) == ACTIVE && $status -ne 143 ]]; then
      echo "the run failed (status $status) on a pod that is still there: look at it, then: $0 delete" >&2
      exit "$status"
    fi
  fi
  echo "the pod was lost or not given ($(state)): another one goes on from the newest checkpoint"
  delete || true
done
echo "given up after $STARTS pods; what there is: $NFS, $out" >&2
exit 1
