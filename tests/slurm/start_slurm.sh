#!/usr/bin/env bash
# A SLURM of one machine, for tests/slurm/trial.py. Debian or Ubuntu, as root; it installs slurm-wlm and munge where they
# are missing, writes /etc/slurm/slurm.conf and starts munged, slurmctld and slurmd by hand (no systemd needed).
#   bash tests/slurm/start_slurm.sh          start
#   bash tests/slurm/start_slurm.sh stop     stop the daemons
set -euo pipefail

stop() { pkill slurmctld || true; pkill slurmd || true; pkill munged || true; }
if [ "${1:-}" = stop ]; then
    stop
    exit
fi
[ "$(id -u)" = 0 ] || { echo "must run as root" >&2; exit 1; }
if [ -f /etc/slurm/slurm.conf ] && ! grep -q '^ClusterName=trial$' /etc/slurm/slurm.conf; then
    echo "/etc/slurm/slurm.conf is not of this script: this machine belongs to a cluster already" >&2
    exit 1
fi
if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge
fi
stop
sleep 1

mkdir -p /run/munge /etc/slurm /var/spool/slurmctld /var/spool/slurmd /var/log/slurm
chown munge: /run/munge
chmod 755 /run/munge
[ -f /etc/munge/munge.key ] || mungekey --create
runuser -u munge -- munged

cat > /etc/slurm/slurm.conf <<CONF
ClusterName=trial
SlurmctldHost=$(hostname -s)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
ReturnToService=2
JobRequeue=1

KillWait=30
MinJobAge=3600
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=trial Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES:4
CONF
rm -rf /var/spool/slurmctld/*
slurmctld
slurmd
for _ in $(seq 30); do
    sinfo --noheader --format '%T' 2>/dev/null | grep -q idle && break
    sleep 1
done
sinfo
