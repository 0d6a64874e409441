#!/usr/bin/env bash
# The state of one Slurm job in the words that Snakemake asks for: running, success or failed.
# A controller that does not answer says nothing of the job: that is "running", and the next question comes soon.
set -u
if answer=$(scontrol --oneliner show job "$1" 2>&1); then
  state=$(grep -o 'JobState=[A-Z_]*' <<<"$answer")
elif grep -q 'Invalid job id' <<<"$answer"; then
  state=$(sacct --noheader --parsable2 --allocations --format State --jobs "$1" 2>/dev/null) # forgotten by the controller
  [ -n "$state" ] || state=GONE
else
  state=UNANSWERED
fi
case "${state#JobState=}" in
  COMPLETED*) echo success ;;
  BOOT_FAIL* | CANCELLED* | DEADLINE* | FAILED* | GONE | NODE_FAIL* | OUT_OF_MEMORY* | PREEMPTED* | TIMEOUT*) echo failed ;;
  *) echo running ;;
esac
