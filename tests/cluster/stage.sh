#!/bin/bash
# Stands in for a command of the pipeline: tells where it ran, with what, and ends as it is told.
[[ -z ${OPCD_TEST_DEAF:-} ]] || trap '' USR1 TERM
for argument in "$@"; do
  [[ $argument != stage=* ]] || stage=${argument#stage=}
done
echo "${stage:-train} on $(hostname) as $OPCD_NODE_RANK of $OPCD_NUM_NODES, attempt $OPCD_ATTEMPT in $PWD"
[[ -z ${OPCD_TEST_COMMAND:-} ]] || bash -c "$OPCD_TEST_COMMAND"
[[ -z ${OPCD_TEST_FAIL:-} || ${stage:-train} != "$OPCD_TEST_FAIL" ]] || exit "${OPCD_TEST_CODE:-1}"
