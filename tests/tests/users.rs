//! Users who are not root: what root has built they can run, and what they write is their own.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::process::Command;
use zygote_tests::*;

/// As another user, where this one can become one; what that user may not reach is mounted elsewhere.
const SCRIPT: &str = "
set -e
folder=$(mktemp -d /tmp/user-XXXXXX)
mkdir $folder/store $folder/home $folder/run
cp $ZYGOTE_PROGRAM $folder/zygote
mount --bind $ZYGOTE_STATE_DIR $folder/store
[ $(stat -c %a /dev/kvm) != 600 ] || chmod 660 /dev/kvm
chown 1234:1234 $folder/home $folder/run
chmod 755 $folder
chmod 700 $folder/run
status=0
setpriv --reuid=1234 --regid=1234 --groups=$(stat -c %g /dev/kvm) env -i PATH=$PATH \
    ZYGOTE_IN_LAB=$ZYGOTE_IN_LAB HOME=$folder/home XDG_RUNTIME_DIR=$folder/run \
    sh -c \"cd $folder/home; set -x; $1\" sh $folder/zygote $folder/store || status=$?
umount $folder/store
find $folder/home -name 'engine.log' -newer $folder/zygote | wc -l
rm -rf $folder
exit $status
";

fn as_user(script: &str) -> Ran {
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", SCRIPT, "sh", script]);
    feed(command, b"")
}

#[test]
fn what_root_has_built_others_run_and_what_they_write_is_their_own() {
    let ran = as_user(
        "$1 run --shared-dir $2 -c 'print(1)'
         ZYGOTE_STATE_DIR=$2 $1 run -c 'print(2)'
         ! $1 template rm python --shared-dir $2
         $1 stop",
    );
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(ran.text(), "1\n2\nthe engine has stopped\n1\n", "{ran:?}");
    assert!(ran.error().contains("not yours to remove"), "{ran:?}");
    // It is there all the same.
    zygote(&["template", "inspect", "python"]).good();
}

#[test]
fn others_branch_and_pause_sandboxes_of_what_root_has_built() {
    let ran = as_user(
        "$1 create --shared-dir $2 --name b >/dev/null
         $1 python b -c 'x = 3'
         $1 branch b --name c >/dev/null
         $1 python c -c 'print(x)'
         $1 snapshot b
         $1 rollback b
         $1 rm c >/dev/null
         $1 pause b >/dev/null
         $1 stop
         $1 resume b --shared-dir $2
         $1 python b -c 'print(x)'
         $1 rm --tree b
         $1 stop",
    );
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(
        ran.text(),
        "3\n@1\nthe engine has stopped\n3\nb\nthe engine has stopped\n1\n",
        "{ran:?}"
    );
}
