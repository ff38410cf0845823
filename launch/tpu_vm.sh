#!/usr/bin/env bash
# A run on all hosts of a Cloud TPU slice:  launch/tpu_vm.sh CONFIG --workdir=DIRECTORY [flags of rmjax.main...]
#
# The processes find each other by themselves. Before the first run, put a clone of rmjax on every host:
#   gcloud compute tpus tpu-vm ssh $TPU --zone=$ZONE --worker=all --command="git clone URL rmjax && pip install -e 'rmjax/[tpu]'"
#
# To edit, or to set in the environment:
TPU=${TPU:-my-v5p-32}
ZONE=${ZONE:-us-east5-a}
FOLDER=${FOLDER:-rmjax}           # on the hosts, where configs/ is
RESTARTS=${RESTARTS:-20}          # times that the run is started again when it ends with code 75
# The workdir must be the same for all hosts: on Filestore, or a bucket mounted with gcsfuse.
set -eu

if (($# < 2)); then
  echo "usage: launch/tpu_vm.sh CONFIG --workdir=DIRECTORY [flags...]" >&2
  exit 2
fi
config=$1
shift
arguments=$(printf ' %q' --config="$config" "$@")
# By which the processes know each other; who may log in on a host can read it there.
secret=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
# Every host starts again by itself; those who come first wait for the others.
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
  cd $(printf %q "$FOLDER")
  export RMJAX_SECRET=$secret
  for ((attempt = 0; attempt <= $RESTARTS; attempt++)); do
    python3 -m rmjax.main$arguments && exit 0
    code=\$?
    ((code == 75)) || exit \$code
    sleep 5
  done
  exit 75"
