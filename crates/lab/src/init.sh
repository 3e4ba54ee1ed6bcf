#!/bin/busybox sh
# First program of the emulated host: modules, the host's root with a throwaway layer, then lab-init.
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t devtmpfs dev /dev
while read -r module; do $B insmod "/modules/$module" || echo "lab: no module $module"; done < /modules/order
$B mount -t tmpfs tmpfs /layer
$B mkdir /layer/upper /layer/work
$B mount -t 9p -o trans=virtio,version=9p2000.L,cache=loose,msize=512000,ro root /host || echo "lab: no root"
$B mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work overlay /root
for folder in proc sys dev; do $B mount --move /$folder /root/$folder; done
$B ln -s /proc/self/fd /root/dev/fd
for number in 0:stdin 1:stdout 2:stderr; do $B ln -s "/proc/self/fd/${number%:*}" "/root/dev/${number#*:}"; done
$B mkdir -p /root/dev/pts /root/dev/shm
$B mount -t devpts devpts /root/dev/pts
for folder in dev/shm run; do $B mount -t tmpfs tmpfs /root/$folder; done
$B mount -t cgroup2 -o favordynmods cgroup2 /root/sys/fs/cgroup || $B mount -t cgroup2 cgroup2 /root/sys/fs/cgroup
$B ip link set lo up 2>/dev/null
for word in $($B cat /root/proc/cmdline); do
    case $word in lab.program=*) program=$($B printf '%b' "${word#lab.program=}") ;; esac
done
exec $B switch_root /root "$program" lab-init
