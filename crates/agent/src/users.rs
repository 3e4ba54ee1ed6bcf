//! Users of the guest, from its own files: passwd(5) and group(5).

use std::fs;
use std::io;

/// Who a program runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// Its groups, `gid` among them.
    pub groups: Vec<u32>,
    pub name: String,
    pub home: String,
}

/// Finds `USER` or `USER:GROUP`, by name or number, in the guest.
pub fn find(words: &str) -> io::Result<User> {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    find_in(words, &read("/etc/passwd"), &read("/etc/group"))
}

fn find_in(words: &str, passwd: &str, group: &str) -> io::Result<User> {
    let (user, wanted_group) = match words.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (words, None),
    };
    let lines = passwd.lines().map(|line| line.split(':').collect());
    let known = lines
        .filter(|fields: &Vec<&str>| fields.len() >= 6)
        .find(|fields| fields[0] == user || fields[2] == user);
    let number = |text: &str| text.parse::<u32>().ok();
    let found = match &known {
        Some(fields) => number(fields[2]).zip(number(fields[3])).map(|ids| {
            let (name, home) = (fields[0].to_owned(), fields[5].to_owned());
            (ids, name, home)
        }),
        // A number needs no name (chown(1)).
        None => number(user).map(|uid| ((uid, uid), user.to_owned(), "/".to_owned())),
    };
    let Some(((uid, own_gid), name, home)) = found else {
        return Err(io::Error::other(format!("no user {user} in the guest")));
    };
    let gid = match wanted_group {
        Some(wanted) => group_id(wanted, group)?,
        None => own_gid,
    };
    let mut groups = vec![gid];
    if wanted_group.is_none() {
        groups.extend(groups_of(&name, group));
    }
    groups.dedup();
    Ok(User {
        uid,
        gid,
        groups,
        name,
        home,
    })
}

fn group_id(wanted: &str, group: &str) -> io::Result<u32> {
    let named = group.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(wanted)).then(|| fields.nth(1)?.parse().ok())?
    });
    named
        .or_else(|| wanted.parse().ok())
        .ok_or_else(|| io::Error::other(format!("no group {wanted} in the guest")))
}

fn groups_of(name: &str, group: &str) -> Vec<u32> {
    let has = |line: &&str| {
        let members = line.split(':').nth(3).unwrap_or_default();
        members.split(',').any(|member| member == name)
    };
    let numbers = group.lines().filter(has);
    numbers
        .filter_map(|line| line.split(':').nth(2)?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/bash\nada:x:1000:100:Ada:/home/ada:/bin/sh\nbad\n";
    const GROUP: &str = "root:x:0:\nusers:x:100:\nwheel:x:27:bob,ada\ndocker:x:99:bob\n";

    #[test]
    fn users_are_found_by_name_and_number_with_their_groups() {
        let find = |words| find_in(words, PASSWD, GROUP);
        let ada = find("ada").unwrap();
        assert_eq!(
            (ada.uid, ada.gid, &ada.groups[..]),
            (1000, 100, &[100, 27][..])
        );
        assert_eq!((&ada.name[..], &ada.home[..]), ("ada", "/home/ada"));
        assert_eq!(find("1000").unwrap(), ada);
        let other = find("ada:wheel").unwrap();
        assert_eq!((other.gid, &other.groups[..]), (27, &[27][..]));
        assert_eq!(find("4000:5").unwrap().gid, 5);
        assert_eq!(find("4000").unwrap().home, "/");
        for bad in ["bob", "", "ada:nogroup", "-1", "4294967296"] {
            assert!(find(bad).is_err(), "{bad}");
        }
    }
}
