#!/usr/bin/env bash
# Runs the C++ kernels' test program on a CPU with AVX-512 that is emulated, for machines without one:
# Bochs as a Sapphire Rapids, which boots a Linux kernel and nothing else. Every instruction set has to
# give the results of the others to the bit (kResults in the program). It takes an hour.
#
#   deploy/avx512_test.sh       (Debian: cmake g++ xorriso isolinux syslinux-common cpio busybox-static)
#
# BOCHS   Bochs 3.0 or later (default: bochs; Debian 13 has it), configured with --enable-evex; its BIOS and
#         VGA BIOS are where BOCHS_BIOS and BOCHS_VGA say (default: /usr/share/bochs, as Debian has them)
# KERNEL  a Linux kernel (default: the newest in /boot; Debian's linux-image-cloud-amd64 starts soonest)
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd)
bochs=${BOCHS:-bochs}
bios=${BOCHS_BIOS:-/usr/share/bochs/BIOS-bochs-latest}
vga=${BOCHS_VGA:-/usr/share/bochs/VGABIOS-lgpl-latest}
sets="avx512_bf16 avx512_vnni avx512 avx_vnni avx2"
seconds=${AVX512_TEST_SECONDS:-7200}

fail() {
    echo "avx512 test: $*" >&2
    exit 1
}

kernel=${KERNEL:-$(find /boot -name 'vmlinuz-*' | sort -V | tail -1)}
isolinux=/usr/lib/ISOLINUX/isolinux.bin
loader=/usr/lib/syslinux/modules/bios/ldlinux.c32
for program in cmake cpio xorriso "$bochs"; do
    command -v "$program" >/dev/null || fail "$program is not installed"
done
for file in "$kernel" "$bios" "$vga" "$isolinux" "$loader" /bin/busybox; do
    [ -f "$file" ] || fail "there is no file ${file:-of a Linux kernel}: see the head of this script"
done
"$bochs" --help cpu 2>&1 | grep -q sapphire_rapids || fail "$bochs knows no Sapphire Rapids: Bochs 3.0 does"

work=$(mktemp -d /tmp/headstart-avx512.XXXXXX)
emulator=
trap '[ -z "$emulator" ] || kill "$emulator" 2>/dev/null; rm -rf "$work"' EXIT

cmake -S "$repository" -B "$work/build" -DHEADSTART_MODULE=OFF -DHEADSTART_KERNEL_TEST=ON -DHEADSTART_OPENMP=OFF \
    -DCMAKE_EXE_LINKER_FLAGS=-static >"$work/build.log"
cmake --build "$work/build" --parallel "$(getconf _NPROCESSORS_ONLN)" >>"$work/build.log" || { cat "$work/build.log"; exit 1; }

mkdir -p "$work/root/bin" "$work/iso/isolinux"
cp "$work/build/kernel_test" "$work/root/bin/"
cp /bin/busybox "$work/root/bin/sh"
printf '#!/bin/sh\n/bin/kernel_test\necho "status $?"\nread forever\n' >"$work/root/init"
chmod +x "$work/root/init"
(cd "$work/root" && find . | cpio -o -H newc --quiet | gzip -1) >"$work/iso/initrd"
cp "$kernel" "$work/iso/vmlinuz"
cp "$isolinux" "$loader" "$work/iso/isolinux/"
cat >"$work/iso/isolinux/isolinux.cfg" <<'END'
default test
prompt 0
label test
 kernel /vmlinuz
 append initrd=/initrd console=ttyS0,115200 nosmp tsc=reliable mitigations=off lpj=1000000 acpi=off quiet
END
xorriso -as mkisofs -quiet -o "$work/test.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot \
    -boot-load-size 4 -boot-info-table "$work/iso" 2>>"$work/build.log" || { cat "$work/build.log"; exit 1; }
cat >"$work/bochsrc" <<END
display_library: nogui
cpu: model=sapphire_rapids, count=1, ips=20000000, reset_on_triple_fault=0
memory: guest=512, host=512
romimage: file=$bios
vgaromimage: file=$vga
ata0-master: type=cdrom, path=$work/test.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$work/serial
log: $work/bochs.log
panic: action=fatal
clock: sync=none
END
touch "$work/serial"
"$bochs" -q -f "$work/bochsrc" >"$work/bochs.out" 2>&1 &
emulator=$!
while ! grep -q '^status ' "$work/serial"; do
    kill -0 "$emulator" 2>/dev/null || { tail "$work/bochs.out" "$work/serial"; fail "Bochs ended"; }
    [ "$SECONDS" -lt "$seconds" ] || { cat "$work/serial"; fail "not done after $seconds s"; }
    sleep 5
done
grep failures "$work/serial"
for set in $sets; do
    grep -q "^$set: 0 failures" "$work/serial" || fail "$set was not run, or failed"
done
grep -q '^status 0' "$work/serial" || fail "the test program failed"
echo "== passed in $SECONDS s"
